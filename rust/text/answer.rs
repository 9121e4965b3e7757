//! What a model's answer is made of: reasoning, content, calls of tools.
//!
//! [`AnswerSplitter`] takes the text as it comes and says what each part of it is, as soon as that
//! is certain. It looks at each character once; what it holds back is the beginning of a marker,
//! blanks before one, and the head of a call until its name is known. What comes out does not
//! depend on how the text was cut into deltas.
//!
//! Nothing is lost: what begins like a call and turns out to be none is content, as it was written.
//! Once a call's name is out, its arguments are passed on as the model writes them, broken or not,
//! as vLLM does in a stream.

mod call;
mod formats;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use call::{CallReader, Step};
pub use formats::{CallFormat, ReasoningTags};

/// How to read one answer.
#[derive(Debug, Clone, Default)]
pub struct AnswerFormat {
    /// What stands around the model's reasoning, where it is to be split off.
    pub reasoning: Option<ReasoningTags>,
    /// The prompt ends within the reasoning: the opening tag is in it.
    pub begins_in_reasoning: bool,
    /// The client does not want to see the reasoning.
    pub drops_reasoning: bool,
    /// Which calls there may be.
    pub calls: Calls,
    /// Names of the tools. A call without a marker around it must name one of them.
    pub tools: Vec<String>,
    /// All calls after the first are left out.
    pub single_call: bool,
}

/// Which calls of tools an answer may hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Calls {
    /// None; what looks like one is content.
    #[default]
    None,
    /// Those that the model writes in its format.
    Written(CallFormat),
    /// The answer is a list of calls, as its constraint has it.
    Required,
    /// The answer is the arguments of a call of this tool, as its constraint has it.
    Named(String),
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// More of the reasoning.
    Reasoning(String),
    /// More of the content.
    Content(String),
    /// A call of this tool begins.
    Call(String),
    /// More of the arguments of the latest call.
    Arguments(String),
}

/// The pieces of a delta, neighbours of one kind as one.
#[derive(Debug, Default)]
pub struct Pieces {
    list: Vec<Piece>,
    calls: u32,
    single_call: bool,
    drops_reasoning: bool,
}

/// Splits one answer.
#[derive(Debug)]
pub struct AnswerSplitter {
    format: Arc<AnswerFormat>,
    at: At,
    /// Blanks that may stand before a marker.
    blank: String,
    /// What may be the beginning of a marker.
    held: String,
    /// Within a list of calls.
    in_list: bool,
    pieces: Pieces,
}

#[derive(Debug)]
enum At {
    /// Before the first word of the answer.
    Begin,
    Reasoning {
        /// Some of it is out.
        began: bool,
    },
    /// Before the first word after the reasoning, or after the marker that ended a call: blanks
    /// are left out.
    Between,
    Content,
    Call(CallReader),
    AfterCall,
    /// The whole text is arguments.
    Arguments,
}

impl AnswerFormat {
    /// Whether the text would come out as it is.
    pub fn is_plain(&self) -> bool {
        self.reasoning.is_none() && self.calls == Calls::None
    }

    /// Markers that begin a call.
    fn opens(&self) -> &'static [&'static str] {
        if let Calls::Written(format) = &self.calls {
            format.opens()
        } else {
            &[]
        }
    }

    fn closes(&self) -> &'static [&'static str] {
        if let Calls::Written(format) = &self.calls {
            format.closes()
        } else {
            &[]
        }
    }

    /// A call may begin the answer without a marker.
    fn is_bare(&self) -> bool {
        match &self.calls {
            Calls::Written(format) => format.is_bare(),
            Calls::Required => true,
            _ => false,
        }
    }
}

impl Piece {
    /// Adds it to pieces of the same answer, to the last one where it is more of that.
    pub fn add_to(self, pieces: &mut Vec<Self>) {
        match (pieces.last_mut(), self) {
            (Some(Self::Content(last)), Self::Content(text))
            | (Some(Self::Reasoning(last)), Self::Reasoning(text))
            | (Some(Self::Arguments(last)), Self::Arguments(text)) => last.push_str(&text),
            (_, piece) => pieces.push(piece),
        }
    }
}

impl Pieces {
    fn add(&mut self, piece: Piece) {
        piece.add_to(&mut self.list);
    }

    fn content(&mut self, text: &str) {
        if !text.is_empty() {
            self.add(Piece::Content(text.to_owned()));
        }
    }

    fn reasoning(&mut self, text: &str) {
        if !text.is_empty() && !self.drops_reasoning {
            self.add(Piece::Reasoning(text.to_owned()));
        }
    }

    fn call(&mut self, name: String) {
        self.calls += 1;
        if !self.is_left_out() {
            self.list.push(Piece::Call(name));
        }
    }

    fn arguments(&mut self, text: &str) {
        if !text.is_empty() && !self.is_left_out() {
            self.add(Piece::Arguments(text.to_owned()));
        }
    }

    fn is_left_out(&self) -> bool {
        self.single_call && self.calls > 1
    }
}

impl AnswerSplitter {
    /// A splitter at the start of an answer.
    pub fn new(format: Arc<AnswerFormat>) -> Self {
        let at = if format.begins_in_reasoning && format.reasoning.is_some() {
            At::Reasoning { began: false }
        } else {
            At::Begin
        };
        let pieces =
            Pieces { single_call: format.single_call, drops_reasoning: format.drops_reasoning, ..Pieces::default() };
        Self { format, at, blank: String::new(), held: String::new(), in_list: false, pieces }
    }

    /// What came last is reasoning, or opens it.
    pub fn is_reasoning(&self) -> bool {
        matches!(self.at, At::Reasoning { .. })
    }

    /// Reasoning may still come, or is here.
    pub fn may_reason(&self) -> bool {
        self.format.reasoning.is_some() && matches!(self.at, At::Begin | At::Reasoning { .. })
    }

    /// Takes more of the text; gives what became certain.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            // Where no marker can come there is nothing to look for.
            match self.at {
                At::Content if self.format.opens().is_empty() && self.blank.is_empty() => {
                    self.pieces.content(rest);
                    break;
                }
                At::Arguments => {
                    self.pieces.arguments(rest);
                    break;
                }
                _ => self.step(c),
            }
            rest = &rest[c.len_utf8()..];
        }
        std::mem::take(&mut self.pieces.list)
    }

    /// The text has ended: what was held back, as what it is now.
    pub fn finish(&mut self) -> Vec<Piece> {
        let blank = std::mem::take(&mut self.blank);
        let held = std::mem::take(&mut self.held);
        match &mut self.at {
            At::Begin | At::Content => {
                self.pieces.content(&blank);
                self.pieces.content(&held);
            }
            At::Reasoning { .. } if held.is_empty() => {}
            At::Reasoning { began } => {
                if *began {
                    self.pieces.reasoning(&blank);
                }
                self.pieces.reasoning(&held);
            }
            At::Between | At::AfterCall => self.pieces.content(&held),
            At::Call(reader) => reader.finish(&mut self.pieces),
            At::Arguments => {}
        }
        std::mem::take(&mut self.pieces.list)
    }

    fn step(&mut self, c: char) {
        match &mut self.at {
            At::Call(reader) => match reader.step(c, &mut self.pieces) {
                Step::More => {}
                Step::Done => self.leave_call(),
                Step::Broken => {
                    self.leave_call();
                    self.step(c);
                }
                Step::NoCall => {
                    let At::Call(reader) = std::mem::replace(&mut self.at, At::Content) else { return };
                    self.in_list = false;
                    self.pieces.content(&reader.into_raw());
                }
            },
            At::AfterCall => self.after_call(c),
            At::Reasoning { .. } => self.reason(c),
            At::Begin | At::Between | At::Content => self.look(c),
            At::Arguments => self.pieces.arguments(c.encode_utf8(&mut [0; 4])),
        }
    }

    fn leave_call(&mut self) {
        if let At::Call(reader) = std::mem::replace(&mut self.at, At::AfterCall) {
            self.in_list = reader.in_list();
        }
    }

    /// Outside of calls and reasoning.
    fn look(&mut self, c: char) {
        if c.is_whitespace() {
            self.release();
            self.blank.push(c);
            return;
        }
        let at_start = !matches!(self.at, At::Content);
        if at_start && self.held.is_empty() && self.format.is_bare() && matches!(c, '{' | '[') {
            self.open(String::new());
            self.step(c);
            return;
        }
        self.held.push(c);
        if let (At::Begin, Some(tags)) = (&self.at, self.format.reasoning) {
            if self.held == tags.open {
                self.held.clear();
                self.blank.clear();
                self.at = At::Reasoning { began: false };
                return;
            }
            if tags.open.starts_with(&self.held) {
                return;
            }
        }
        self.settle();
    }

    /// Sees whether what is held begins a call, or can; lets go of what cannot.
    fn settle(&mut self) {
        while !self.held.is_empty() {
            let opens = self.format.opens();
            if opens.contains(&self.held.as_str()) {
                let marker = std::mem::take(&mut self.held);
                self.open(marker);
                return;
            }
            if opens.iter().any(|marker| marker.starts_with(&self.held)) {
                return;
            }
            self.enter_content();
            let first = self.held.chars().next().map_or(0, char::len_utf8);
            self.pass(first);
        }
    }

    /// What is held is no marker, since none has a blank in it.
    fn release(&mut self) {
        if !self.held.is_empty() {
            self.enter_content();
            self.pass(self.held.len());
        }
    }

    /// Passes on the first `length` bytes of what is held, as content.
    fn pass(&mut self, length: usize) {
        if let At::Arguments = self.at {
            self.pieces.arguments(&self.held[..length]);
        } else {
            self.pieces.content(&self.blank);
            self.pieces.content(&self.held[..length]);
        }
        self.blank.clear();
        self.held.drain(..length);
    }

    /// The answer proper begins.
    fn enter_content(&mut self) {
        match (&self.at, &self.format.calls) {
            (At::Arguments, _) => {}
            (At::Begin | At::Between, Calls::Named(name)) => {
                self.pieces.call(name.clone());
                self.at = At::Arguments;
            }
            (at, _) => {
                if matches!(at, At::Between) {
                    self.blank.clear();
                }
                self.at = At::Content;
            }
        }
    }

    /// A call begins behind `marker`.
    fn open(&mut self, marker: String) {
        let blank = std::mem::take(&mut self.blank);
        let raw = if matches!(self.at, At::Between | At::AfterCall) { marker } else { blank + &marker };
        self.at = At::Call(CallReader::new(Arc::clone(&self.format), raw, self.in_list));
    }

    fn reason(&mut self, c: char) {
        let Some(tags) = self.format.reasoning else { return };
        if c.is_whitespace() && self.held.is_empty() {
            self.blank.push(c);
            return;
        }
        self.held.push(c);
        if self.held == tags.close {
            self.held.clear();
            self.blank.clear();
            self.at = At::Between;
            return;
        }
        while !self.held.is_empty() && !tags.close.starts_with(&self.held) {
            if let At::Reasoning { began } = &mut self.at {
                if std::mem::replace(began, true) {
                    self.pieces.reasoning(&self.blank);
                }
            }
            self.blank.clear();
            let first = self.held.chars().next().map_or(0, char::len_utf8);
            let passed: String = self.held.drain(..first).collect();
            if passed.chars().all(char::is_whitespace) {
                self.blank = passed;
            } else {
                self.pieces.reasoning(&passed);
            }
        }
    }

    /// Behind a call: another, the end of its marker or of the list, or content.
    fn after_call(&mut self, c: char) {
        if self.held.is_empty() {
            match c {
                _ if c.is_whitespace() => return,
                ',' if self.in_list || self.format.is_bare() => return,
                ';' if self.format.is_bare() => return,
                ']' if self.in_list => {
                    self.in_list = false;
                    return;
                }
                '{' => {
                    self.open(String::new());
                    self.step(c);
                    return;
                }
                _ => {}
            }
        }
        if c.is_whitespace() {
            self.at = At::Content;
            self.look(c);
            return;
        }
        self.held.push(c);
        if self.format.closes().contains(&self.held.as_str()) {
            self.held.clear();
            self.in_list = false;
            self.at = At::Between;
            return;
        }
        if self.format.closes().iter().any(|marker| marker.starts_with(&self.held)) {
            return;
        }
        let opens = self.format.opens();
        if opens.contains(&self.held.as_str()) {
            self.in_list = false;
        } else if !opens.iter().any(|marker| marker.starts_with(&self.held)) {
            self.at = At::Content;
        }
        self.settle();
    }
}
