//! Stop strings over a stream of text deltas.
//!
//! The output is cut at the first stop string to be completed, wherever token borders fall, and
//! only the longest suffix that is a proper prefix of some stop string is held back. Each stop
//! string is followed by its own Knuth-Morris-Pratt automaton over bytes, so the work is linear in
//! the text (times the number of stop strings) and the result does not depend on how the text was
//! split into deltas.
//!
//! Knows nothing of tokens: it sees generated text only, never the prompt.

use std::sync::Arc;

/// A stop string was completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopHit {
    /// Which of the stop strings, as they were given.
    pub index: usize,
}

/// Stop strings of a request with their automata, shared by its output sequences.
#[derive(Debug, Clone, PartialEq)]
pub struct StopPatterns(Arc<[Pattern]>);

impl StopPatterns {
    /// An empty stop string never matches.
    pub fn new(stops: &[String]) -> Self {
        Self(stops.iter().map(|stop| Pattern::new(stop)).collect())
    }

    /// Whether there is nothing to stop at.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The stop string at `index`, as they were given.
    pub fn text(&self, index: usize) -> &str {
        &self.0[index].text
    }
}

/// Where the text of one output sequence stands in the stop strings.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    patterns: StopPatterns,
    /// Of each pattern: length of the longest proper prefix that the text ends with.
    matched: Vec<usize>,
    include_stop: bool,
    /// Text that has been pushed but not yet released.
    held: String,
}

impl StopMatcher {
    /// A matcher at the start of a sequence. `include_stop` keeps the stop string in the output.
    pub fn new(patterns: StopPatterns, include_stop: bool) -> Self {
        Self { matched: vec![0; patterns.0.len()], patterns, include_stop, held: String::new() }
    }

    /// Takes `delta` and appends to `out` what can no longer be part of a stop string. After a hit
    /// `out` has the text up to the match and the sequence is over. Where it `may_stop` not yet, a
    /// stop string that ends here is text like any other, and one that has only begun can still
    /// count.
    ///
    /// Of stop strings that are completed by the same character the longest wins, then the first
    /// given.
    pub fn push(&mut self, delta: &str, may_stop: bool, out: &mut String) -> Option<StopHit> {
        if self.matched.is_empty() {
            out.push_str(delta);
            return None;
        }
        let num_held = self.held.len();
        self.held.push_str(delta);
        for (position, &byte) in delta.as_bytes().iter().enumerate() {
            // (index, length in bytes) of the stop string completed by this byte
            let mut hit: Option<(usize, usize)> = None;
            for (index, (pattern, matched)) in self.patterns.0.iter().zip(&mut self.matched).enumerate() {
                if pattern.advance(matched, byte) {
                    if may_stop && hit.is_none_or(|(_, longest)| pattern.text.len() > longest) {
                        hit = Some((index, pattern.text.len()));
                    }
                    *matched = pattern.failure[pattern.text.len() - 1] as usize;
                }
            }
            if let Some((index, length)) = hit {
                let end = num_held + position + 1;
                let start = end - length;
                out.push_str(&self.held[..if self.include_stop { end } else { start }]);
                self.held.clear();
                self.matched.fill(0);
                return Some(StopHit { index });
            }
        }
        let keep = self.matched.iter().copied().max().unwrap_or(0);
        let release = self.held.len() - keep;
        out.push_str(&self.held[..release]);
        self.held.drain(..release);
        None
    }

    /// Releases what was held back: the sequence ended for another reason.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

/// One stop string with its Knuth-Morris-Pratt failure table.
#[derive(Debug, Clone, PartialEq)]
struct Pattern {
    text: Box<str>,
    /// `failure[i]`: length of the longest proper prefix of the first `i + 1` bytes that is also
    /// its suffix.
    failure: Box<[u32]>,
}

impl Pattern {
    fn new(stop: &str) -> Self {
        let bytes = stop.as_bytes();
        let mut failure = vec![0u32; bytes.len()];
        let mut matched = 0;
        for i in 1..bytes.len() {
            while matched > 0 && bytes[i] != bytes[matched] {
                matched = failure[matched - 1] as usize;
            }
            if bytes[i] == bytes[matched] {
                matched += 1;
            }
            failure[i] = matched as u32;
        }
        Self { text: stop.into(), failure: failure.into() }
    }

    /// Takes the next byte of the text; true when it completes the stop string, of which `matched`
    /// bytes were there.
    fn advance(&self, matched: &mut usize, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        if bytes.is_empty() {
            return false;
        }
        while *matched > 0 && bytes[*matched] != byte {
            *matched = self.failure[*matched - 1] as usize;
        }
        if bytes[*matched] == byte {
            *matched += 1;
        }
        *matched == bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Where `stop` begins in `text`.
    fn starts<'a>(text: &'a str, stop: &'a str) -> impl Iterator<Item = usize> + 'a {
        text.char_indices().map(|(at, _)| at).filter(move |&at| text[at..].starts_with(stop))
    }

    /// Cut at the stop string that ends first after `least` bytes; of those the longest, then the
    /// first given.
    fn cut(text: &str, stops: &[String], include: bool, least: usize) -> (String, Option<usize>) {
        let first = stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .filter_map(|(index, stop)| {
                let start = starts(text, stop).find(|start| start + stop.len() > least)?;
                Some((start + stop.len(), start, index))
            })
            .min();
        match first {
            Some((end, start, index)) => (text[..if include { end } else { start }].to_owned(), Some(index)),
            None => (text.to_owned(), None),
        }
    }

    /// The longest suffix of `text` that is a proper prefix of a stop string.
    fn held(text: &str, stops: &[String]) -> usize {
        let is_held = |suffix: &str| stops.iter().any(|stop| stop.len() > suffix.len() && stop.starts_with(suffix));
        text.char_indices().find(|&(at, _)| is_held(&text[at..])).map_or(0, |(at, _)| text.len() - at)
    }

    proptest! {
        #[test]
        fn any_split_gives_the_text_cut_at_the_first_match(
            deltas in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{0,5}", 0..4),
            include: bool,
            before in 0_usize..8,
        ) {
            let before = before.min(deltas.len());
            let (expected, index) = cut(&deltas.concat(), &stops, include, deltas[..before].concat().len());
            let mut matcher = StopMatcher::new(StopPatterns::new(&stops), include);
            let (mut out, mut pushed, mut hit) = (String::new(), String::new(), None);
            for (position, delta) in deltas.iter().enumerate() {
                hit = matcher.push(delta, position >= before, &mut out);
                pushed.push_str(delta);
                if hit.is_some() {
                    break;
                }
                prop_assert_eq!(out.len(), pushed.len() - held(&pushed, &stops));
            }
            if hit.is_none() {
                matcher.finish(&mut out);
            }
            prop_assert_eq!(out, expected);
            prop_assert_eq!(hit.map(|hit| hit.index), index);
        }
    }
}
