//! Tokens, and where each short run of them came before.

/// The earlier occurrences that one look goes through, at most: a run of blanks has thousands.
const MOST_LOOKED_AT: usize = 8;
/// Matches of one look, at most: the end of the text itself may be among the places.
pub(super) const MOST_FOUND: usize = 1 + MOST_LOOKED_AT;

/// A place in a [`History`] before which the same tokens stand as at the end of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Match {
    /// Index of the token that came next there.
    pub next: usize,
    /// How many tokens before it are the same.
    pub len: usize,
}

/// A text that grows, with an index over its runs of `key_len` tokens: hash chains, as LZ77
/// compressors keep them. A token costs a hash and two words; a look costs at most
/// [`MOST_LOOKED_AT`] comparisons.
#[derive(Debug)]
pub(super) struct History {
    key_len: usize,
    tokens: Vec<u32>,
    /// By hash of a run: one past the index of the last token of its latest occurrence; 0: none.
    latest: Vec<u32>,
    /// For each token: the same of the occurrence before the one that ends here.
    before: Vec<u32>,
}

impl History {
    /// An empty text. `key_len` is at least 1.
    pub fn new(key_len: usize) -> Self {
        Self { key_len, tokens: Vec::new(), latest: vec![0; 64], before: Vec::new() }
    }

    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.before.push(0);
        if self.tokens.len() > 2 * self.latest.len() {
            self.widen();
        } else {
            self.link(self.tokens.len());
        }
    }

    pub fn extend(&mut self, tokens: &[u32]) {
        self.tokens.reserve(tokens.len());
        self.before.reserve(tokens.len());
        for token in tokens {
            self.push(*token);
        }
    }

    /// Puts the run that ends before index `end` in front of its chain.
    fn link(&mut self, end: usize) {
        if end >= self.key_len {
            let place = self.place(&self.tokens[end - self.key_len..end]);
            self.before[end - 1] = std::mem::replace(&mut self.latest[place], end as u32);
        }
    }

    /// Makes room for more chains: all are linked anew, so a token is linked a few times at most.
    fn widen(&mut self) {
        self.latest = vec![0; 4 * self.latest.len()];
        for end in 1..=self.tokens.len() {
            self.link(end);
        }
    }

    fn place(&self, run: &[u32]) -> usize {
        let hash = run
            .iter()
            .fold(0_u64, |hash, token| (hash.rotate_left(5) ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        (hash >> 32) as usize & (self.latest.len() - 1)
    }

    /// Where the last tokens of `text` came before, the latest first: at least `key_len` of them are
    /// the same, and no more than `most` are compared. A place that has nothing behind it, as the
    /// end of this very text, is no match.
    pub fn matches<'a>(&'a self, text: &'a [u32], most: usize) -> impl Iterator<Item = Match> + 'a {
        let link = |end: u32| (end > 0).then_some(end as usize);
        let run = text.len().checked_sub(self.key_len).map(|start| &text[start..]);
        let latest = run.and_then(|run| link(self.latest[self.place(run)]));
        let ends = std::iter::successors(latest, move |end| link(self.before[end - 1])).take(MOST_FOUND);
        ends.filter(|end| *end < self.tokens.len()).filter_map(move |end| {
            let same = self.tokens[..end].iter().rev().zip(text.iter().rev()).take(most);
            let len = same.take_while(|(there, here)| there == here).count();
            (len >= self.key_len).then_some(Match { next: end, len })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// Every place where the last `key_len` tokens came before, by looking at all of them.
    fn slow(tokens: &[u32], text: &[u32], key_len: usize, most: usize) -> Vec<Match> {
        let mut found = Vec::new();
        for next in (key_len..tokens.len()).rev() {
            let limit = most.min(next).min(text.len());
            let len = (1..=limit).take_while(|len| tokens[next - len] == text[text.len() - len]).count();
            if len >= key_len && text.len() >= key_len {
                found.push(Match { next, len });
            }
        }
        found
    }

    #[test]
    fn finds_what_a_slow_search_finds() {
        let rng = &mut StdRng::seed_from_u64(7);
        for key_len in 1..=4 {
            let mut history = History::new(key_len);
            for count in 0..600 {
                let text = history.tokens().to_vec();
                let expected = slow(&text, &text, key_len, 6);
                let found: Vec<Match> = history.matches(&text, 6).collect();
                // Other runs of the same hash use up some of the places that are looked at.
                assert!(expected.starts_with(&found), "after {count} tokens, runs of {key_len}: {found:?}");
                assert_eq!(found.first(), expected.first(), "after {count} tokens, runs of {key_len}");
                let wide = if count < 300 { 3 } else { 40 };
                history.push(rng.random_range(0..wide));
            }
        }
    }

    #[test]
    fn another_text_is_looked_up_too() {
        let mut store = History::new(2);
        store.extend(&[1, 2, 3, 4, 1, 2, 9]);
        let found: Vec<Match> = store.matches(&[7, 1, 2], 8).collect();
        assert_eq!(found, [Match { next: 6, len: 2 }, Match { next: 2, len: 2 }]);
        assert_eq!(store.matches(&[2], 8).count(), 0);
    }
}
