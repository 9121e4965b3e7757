//! Messages to token ids, such that no message can write a special token.
//!
//! A client's text may contain `<|im_end|>`, whole or in parts that the template puts together. So
//! before rendering, wherever a client's string holds a special token, ends with the beginning of
//! one or begins with the end of one, one character is exchanged for a stand-in: a Unicode
//! noncharacter that occurs in no message. Lengths, trimming and comparisons stay what they were.
//! Special tokens are then looked for in the rendered text, where only those of the template are
//! still whole; after that the stand-ins are turned back and all else is tokenised as ordinary
//! text.

use std::collections::HashSet;

use aho_corasick::{AhoCorasick, MatchKind};

use crate::error::{Error, Result};
use crate::text::added_tokens::{automaton, AddedMatch};
use crate::text::json::Json;
use crate::text::python_methods::is_space;
use crate::text::python_values::is_noncharacter;
use crate::text::template::Inputs;
use crate::text::{ChatTemplate, RenderOptions, Specials, Tokenizer};

impl Tokenizer {
    /// Renders a conversation and tokenises it. Nothing is added: the template writes BOS where the
    /// model wants it.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and what tokenising can give.
    pub fn encode_chat(
        &self,
        template: &ChatTemplate,
        messages_json: &[u8],
        options: &RenderOptions,
    ) -> Result<Vec<u32>> {
        let mut inputs = Inputs::parse(messages_json, options)?;
        let mut stand_ins = StandIns::new(&inputs);
        if let Some(finder) = self.special_finder() {
            let mut replace = |text: &mut String| finder.replace(text, &mut stand_ins);
            for_each_string(&mut inputs.messages, &mut replace)?;
            for_each_string(&mut inputs.tools, &mut replace)?;
            for (_, value) in &mut inputs.kwargs {
                for_each_string(value, &mut replace)?;
            }
        }
        let end = if options.continue_final_message { Some(stand_ins.mark_end(&mut inputs.messages)?) } else { None };
        let mut rendered = template.render_inputs(&inputs)?;
        if let Some(mark) = end {
            let Some(at) = rendered.rfind(mark) else {
                let message = "continue_final_message: the chat template does not show the last message";
                return Err(Error::Template(message.to_owned()));
            };
            rendered.truncate(at);
        }
        let (text, matches) = stand_ins.restore(&rendered, self.find_added_tokens(&rendered));
        self.encode_text(&text, false, Specials::At(&matches))
    }
}

/// Finds where a client's string could make, or help to make, a special token.
#[derive(Debug)]
pub(crate) struct SpecialFinder {
    whole: AhoCorasick,
    /// All of them in order, so that those that begin with a text stand together.
    forwards: Vec<Box<[u8]>>,
    /// All of them read backwards, in order.
    backwards: Vec<Box<[u8]>>,
    longest: usize,
}

impl SpecialFinder {
    /// `None` if there is no special token.
    pub fn new<'a>(specials: impl Iterator<Item = &'a str> + Clone) -> Result<Option<Self>> {
        let specials = specials.filter(|special| !special.is_empty());
        let Some(longest) = specials.clone().map(str::len).max() else { return Ok(None) };
        let texts: Vec<&str> = specials.collect();
        let mut forwards: Vec<Box<[u8]>> = texts.iter().map(|special| special.as_bytes().into()).collect();
        let mut backwards: Vec<Box<[u8]>> = texts.iter().map(|special| special.bytes().rev().collect()).collect();
        forwards.sort_unstable();
        backwards.sort_unstable();
        Ok(Some(Self { whole: automaton(&texts, MatchKind::Standard)?, forwards, backwards, longest }))
    }

    fn replace(&self, text: &mut String, stand_ins: &mut StandIns) -> Result<()> {
        let mut starts: Vec<usize> = self.whole.find_overlapping_iter(&*text).map(|found| found.start()).collect();
        // A template may trim what it puts next to its own text.
        for tail in [text.as_str(), text.trim_end_matches(is_space)] {
            let parts = tail.char_indices().rev().map(|(at, _)| at).take_while(|at| tail.len() - at <= self.longest);
            starts.extend(parts.filter(|&at| begins_one(&self.forwards, &tail.as_bytes()[at..])));
        }
        for head in [text.as_str(), text.trim_start_matches(is_space)] {
            let mut longest = self.longest.min(head.len());
            while !head.is_char_boundary(longest) {
                longest -= 1;
            }
            let backwards: Vec<u8> = head[..longest].bytes().rev().collect();
            let mut parts = head[..longest].char_indices().map(|(at, c)| at + c.len_utf8());
            if parts.any(|end| begins_one(&self.backwards, &backwards[longest - end..])) {
                starts.push(text.len() - head.len());
            }
        }
        if starts.is_empty() {
            return Ok(());
        }
        starts.sort_unstable();
        starts.dedup();
        let mut replaced = String::with_capacity(text.len() + 2 * starts.len());
        let mut copied = 0;
        for start in starts {
            let original = text[start..].chars().next().expect("a match holds at least one character");
            replaced.push_str(&text[copied..start]);
            replaced.push(stand_ins.get(original)?);
            copied = start + original.len_utf8();
        }
        replaced.push_str(&text[copied..]);
        *text = replaced;
        Ok(())
    }
}

/// Whether one of `sorted` begins with `part` and is longer.
fn begins_one(sorted: &[Box<[u8]>], part: &[u8]) -> bool {
    // Those that begin with it follow it in the order.
    let next = sorted.partition_point(|special| **special <= *part);
    sorted.get(next).is_some_and(|special| special.starts_with(part))
}

/// Which noncharacter stands for which character.
#[derive(Debug)]
struct StandIns {
    free: Vec<char>,
    /// (original, stand-in)
    used: Vec<(char, char)>,
}

impl StandIns {
    fn new(inputs: &Inputs) -> Self {
        let mut taken = HashSet::new();
        let mut note = |text: &str| taken.extend(text.chars().filter(|&c| is_noncharacter(c)));
        visit_strings(&inputs.messages, &mut note);
        visit_strings(&inputs.tools, &mut note);
        inputs.kwargs.iter().for_each(|(_, value)| visit_strings(value, &mut note));
        let in_planes = (0..=0x10).flat_map(|plane| [plane << 16 | 0xFFFE, plane << 16 | 0xFFFF]);
        let free = (0xFDD0..=0xFDEF).chain(in_planes).filter_map(char::from_u32).filter(|c| !taken.contains(c));
        Self { free: free.collect(), used: Vec::new() }
    }

    fn get(&mut self, original: char) -> Result<char> {
        if let Some((_, stand_in)) = self.used.iter().find(|(c, _)| *c == original) {
            return Ok(*stand_in);
        }
        let stand_in = self
            .free
            .pop()
            .ok_or_else(|| Error::Template("messages write parts of too many different special tokens".to_owned()))?;
        self.used.push((original, stand_in));
        Ok(stand_in)
    }

    /// Puts a stand-in behind the content of the last message, and nowhere else.
    fn mark_end(&mut self, messages: &mut Json) -> Result<char> {
        let mark = self.free.pop().ok_or_else(|| Error::Template("messages use all noncharacters".to_owned()))?;
        let Json::Array(list) = messages else { return Ok(mark) };
        let Some(Json::Object(pairs)) = list.last_mut() else { return Ok(mark) };
        match pairs.iter_mut().find(|(key, _)| key == "content") {
            Some((_, Json::Text(content))) => content.push(mark),
            _ => return Err(Error::Template("continue_final_message: the last message has no text".to_owned())),
        }
        Ok(mark)
    }

    /// The text with the original characters, and the matches moved to where they lie in it.
    fn restore(&self, rendered: &str, matches: Vec<AddedMatch>) -> (String, Vec<AddedMatch>) {
        let mut text = String::with_capacity(rendered.len());
        let original = |c| self.used.iter().find(|(_, stand_in)| *stand_in == c).map_or(c, |(original, _)| *original);
        let mut restored = 0;
        let mut moved = Vec::with_capacity(matches.len());
        for found in matches {
            text.extend(rendered[restored..found.range.start].chars().map(original));
            let start = text.len();
            text.push_str(&rendered[found.range.clone()]);
            restored = found.range.end;
            moved.push(AddedMatch { range: start..text.len(), ..found });
        }
        text.extend(rendered[restored..].chars().map(original));
        (text, moved)
    }
}

/// Every string inside `json`, keys included.
fn visit_strings(json: &Json, visit: &mut impl FnMut(&str)) {
    match json {
        Json::Text(text) => visit(text),
        Json::Array(items) => items.iter().for_each(|item| visit_strings(item, visit)),
        Json::Object(pairs) => pairs.iter().for_each(|(key, value)| {
            visit(key);
            visit_strings(value, visit);
        }),
        _ => {}
    }
}

/// Changes every string inside `json`, keys included.
fn for_each_string(json: &mut Json, change: &mut impl FnMut(&mut String) -> Result<()>) -> Result<()> {
    match json {
        Json::Text(text) => change(text),
        Json::Array(items) => items.iter_mut().try_for_each(|item| for_each_string(item, change)),
        Json::Object(pairs) => {
            for (key, value) in pairs {
                change(key)?;
                for_each_string(value, change)?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Where a character must be exchanged, by what the rules say of every special token.
    fn expected(specials: &[String], text: &str) -> Vec<usize> {
        let boundaries = |text: &str| text.char_indices().map(|(at, _)| at).chain([text.len()]).collect::<Vec<_>>();
        let mut starts = Vec::new();
        for special in specials.iter().filter(|special| !special.is_empty()) {
            starts.extend(boundaries(text).into_iter().filter(|&at| text[at..].starts_with(special.as_str())));
            for cut in boundaries(special).into_iter().filter(|cut| (1..special.len()).contains(cut)) {
                let (beginning, end) = special.split_at(cut);
                for tail in [text, text.trim_end_matches(is_space)] {
                    starts.extend(tail.ends_with(beginning).then(|| tail.len() - beginning.len()));
                }
                for head in [text, text.trim_start_matches(is_space)] {
                    starts.extend(head.starts_with(end).then(|| text.len() - head.len()));
                }
            }
        }
        starts.sort_unstable();
        starts.dedup();
        starts
    }

    proptest! {
        #[test]
        fn characters_are_exchanged_where_a_special_token_could_arise(
            specials in prop::collection::vec("[ab<é ]{0,4}", 0..4),
            text in "[ab<é ]{0,8}",
        ) {
            let finder = SpecialFinder::new(specials.iter().map(String::as_str)).unwrap();
            let inputs = Inputs::parse(b"[]", &RenderOptions::default()).unwrap();
            let mut replaced = text.clone();
            if let Some(finder) = finder {
                finder.replace(&mut replaced, &mut StandIns::new(&inputs)).unwrap();
            }
            let pairs = text.char_indices().zip(replaced.chars());
            let exchanged: Vec<usize> = pairs.filter(|((_, old), new)| old != new).map(|((at, _), _)| at).collect();
            prop_assert_eq!(exchanged, expected(&specials, &text));
        }
    }
}
