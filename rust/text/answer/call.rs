//! One call of a tool, read from its JSON as it comes.

use std::sync::Arc;

use super::{AnswerFormat, Calls, Pieces};

/// Characters of a name that stands outside of JSON, with what follows it.
const MAX_OUTER_NAME: usize = 256;

/// What a character means to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The call goes on.
    More,
    /// It ends with this character.
    Done,
    /// It ended before this character, where it cannot go on; its name is out.
    Broken,
    /// It is none: [`CallReader::into_raw`] has what was read, this character too.
    NoCall,
}

/// Where a call stands.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // each says that something has come
pub(super) struct CallReader {
    format: Arc<AnswerFormat>,
    /// All that was read, until the name is out.
    raw: String,
    at: At,
    in_list: bool,
    has_name: bool,
    has_arguments: bool,
    /// Arguments that are not out: the name has not come, or they may be null.
    early: String,
    /// The string or name that is being read, with its escapes.
    text: String,
    escaped: bool,
}

#[derive(Debug)]
enum At {
    /// Before the object.
    Start,
    /// In a name outside of JSON.
    OuterName,
    /// Before a key, or the object's end.
    Key,
    InKey,
    Colon,
    Value,
    InName,
    Arguments(Span),
    /// Arguments as text in a string.
    ArgumentsText,
    Other(Span),
    /// Behind a value.
    After,
    /// In arguments that follow a name outside of JSON.
    OuterArguments(Span),
}

impl CallReader {
    /// A call behind `raw`, which is content if there is none.
    pub(super) fn new(format: Arc<AnswerFormat>, raw: String, in_list: bool) -> Self {
        Self {
            format,
            raw,
            at: At::Start,
            in_list,
            has_name: false,
            has_arguments: false,
            early: String::new(),
            text: String::new(),
            escaped: false,
        }
    }

    pub(super) fn in_list(&self) -> bool {
        self.in_list
    }

    /// What was read.
    pub(super) fn into_raw(self) -> String {
        self.raw
    }

    /// The text has ended within it.
    pub(super) fn finish(&mut self, out: &mut Pieces) {
        if self.has_name {
            out.arguments(&std::mem::take(&mut self.early));
        } else {
            out.content(&std::mem::take(&mut self.raw));
        }
    }

    pub(super) fn step(&mut self, c: char, out: &mut Pieces) -> Step {
        if !self.has_name {
            self.raw.push(c);
        }
        match self.read(c, out) {
            Step::Broken if !self.has_name => Step::NoCall,
            Step::Broken => {
                out.arguments(&std::mem::take(&mut self.early));
                Step::Broken
            }
            step => step,
        }
    }

    fn read(&mut self, c: char, out: &mut Pieces) -> Step {
        match &mut self.at {
            At::Start => return self.start(c),
            At::OuterName => return self.outer_name(c, out),
            At::Key => match c {
                '"' => self.at = At::InKey,
                '}' => return self.end(out),
                _ if c.is_whitespace() => {}
                _ => return Step::Broken,
            },
            At::InKey => {
                if self.string(c) {
                    if !self.may_have(&self.text) {
                        return Step::Broken;
                    }
                    self.at = At::Colon;
                }
                return Step::More;
            }
            At::Colon => match c {
                ':' => self.at = At::Value,
                _ if c.is_whitespace() => {}
                _ => return Step::Broken,
            },
            At::Value if c.is_whitespace() => {}
            At::Value => return self.value(c, out),
            At::InName => {
                if self.string(c) {
                    let name = std::mem::take(&mut self.text);
                    return self.name(&name, out);
                }
            }
            At::Arguments(span) | At::OuterArguments(span) => {
                let reach = span.step(c);
                return self.arguments(c, reach, out);
            }
            At::ArgumentsText => return self.arguments_text(c, out),
            At::Other(span) => match span.step(c) {
                Reach::Inside => {}
                Reach::Last => self.at = At::After,
                Reach::Past => {
                    self.at = At::After;
                    return self.read(c, out);
                }
                Reach::Bad => return Step::Broken,
            },
            At::After => match c {
                ',' => self.at = At::Key,
                '}' => return self.end(out),
                _ if c.is_whitespace() => {}
                _ => return Step::Broken,
            },
        }
        Step::More
    }

    /// Leaves [`At::Start`] where an object or a name begins.
    fn start(&mut self, c: char) -> Step {
        let has_outer_names = matches!(&self.format.calls, Calls::Written(format) if format.has_outer_names());
        match c {
            '{' => self.at = At::Key,
            '[' if !self.in_list => self.in_list = true,
            _ if has_outer_names && !self.in_list && is_of_a_name(c) => {
                self.at = At::OuterName;
                self.text.push(c);
            }
            _ if c.is_whitespace() => {}
            _ => return Step::Broken,
        }
        Step::More
    }

    /// `name{`, `name[ARGS]{` or `name[CALL_ID]id[ARGS]{`.
    fn outer_name(&mut self, c: char, out: &mut Pieces) -> Step {
        if c != '{' {
            let goes_on = (is_of_a_name(c) || matches!(c, '[' | ']')) && self.text.len() < MAX_OUTER_NAME;
            self.text.push(c);
            return if goes_on { Step::More } else { Step::Broken };
        }
        let mut span = Span::default();
        span.step(c);
        self.at = At::OuterArguments(span);
        let text = std::mem::take(&mut self.text);
        let name = text.split('[').next().unwrap_or_default();
        self.has_name = true;
        self.has_arguments = true;
        self.raw = String::new();
        out.call(name.to_owned());
        out.arguments("{");
        Step::More
    }

    /// Whether an object with such a key can be a call. Where JSON stands without a marker, one
    /// that has other keys is an answer, which must not be held back.
    fn may_have(&self, key: &str) -> bool {
        !self.format.is_bare() || self.has_name || matches!(key, "name" | "arguments" | "parameters" | "type" | "id")
    }

    fn value(&mut self, c: char, out: &mut Pieces) -> Step {
        let key = std::mem::take(&mut self.text);
        let is_arguments = matches!(key.as_str(), "arguments" | "parameters");
        match key.as_str() {
            "name" if !self.has_name => {
                self.at = At::InName;
                return if c == '"' { Step::More } else { Step::Broken };
            }
            _ if is_arguments && !self.has_arguments => {
                self.has_arguments = true;
                self.at = if c == '"' { At::ArgumentsText } else { At::Arguments(Span::default()) };
            }
            _ => self.at = At::Other(Span::default()),
        }
        if matches!(self.at, At::ArgumentsText) {
            Step::More
        } else {
            self.read(c, out)
        }
    }

    fn name(&mut self, name: &str, out: &mut Pieces) -> Step {
        if name.is_empty() || (self.format.is_bare() && !self.format.tools.iter().any(|tool| tool == name)) {
            return Step::Broken;
        }
        self.has_name = true;
        self.raw = String::new();
        self.at = At::After;
        out.call(name.to_owned());
        out.arguments(&std::mem::take(&mut self.early));
        Step::More
    }

    fn arguments(&mut self, c: char, reach: Reach, out: &mut Pieces) -> Step {
        let (At::Arguments(span) | At::OuterArguments(span)) = &self.at else { return Step::Broken };
        let is_word = span.is_word();
        if matches!(reach, Reach::Inside | Reach::Last) {
            if self.has_name && !is_word {
                out.arguments(c.encode_utf8(&mut [0; 4]));
            } else {
                self.early.push(c);
            }
        }
        match reach {
            Reach::Inside => Step::More,
            Reach::Last if matches!(self.at, At::OuterArguments(_)) => Step::Done,
            Reach::Last => {
                self.at = At::After;
                Step::More
            }
            Reach::Past => {
                if self.early == "null" {
                    self.early.clear();
                    self.has_arguments = false;
                } else if self.has_name {
                    out.arguments(&std::mem::take(&mut self.early));
                }
                self.at = At::After;
                self.read(c, out)
            }
            Reach::Bad => Step::Broken,
        }
    }

    /// Arguments that are JSON in a string leave without the string's escapes.
    fn arguments_text(&mut self, c: char, out: &mut Pieces) -> Step {
        let was_plain = self.text.is_empty();
        if self.string(c) {
            let half = std::mem::take(&mut self.text); // of a pair of surrogates
            self.pass_argument(&half, out);
            self.at = At::After;
            return Step::More;
        }
        if was_plain && c != '\\' {
            self.text.clear();
            self.pass_argument(c.encode_utf8(&mut [0; 4]), out);
        } else if is_whole_escape(&self.text) {
            let text = unescaped(&std::mem::take(&mut self.text));
            self.pass_argument(&text, out);
        }
        Step::More
    }

    fn pass_argument(&mut self, text: &str, out: &mut Pieces) {
        if self.has_name {
            out.arguments(text);
        } else {
            self.early.push_str(text);
        }
    }

    /// Reads a string's inside into `text`; true at its closing quote, with the escapes undone.
    fn string(&mut self, c: char) -> bool {
        if !self.escaped && c == '"' {
            if self.text.contains('\\') {
                self.text = unescaped(&self.text);
            }
            return true;
        }
        self.escaped = !self.escaped && c == '\\';
        self.text.push(c);
        false
    }

    /// The object's closing bracket.
    fn end(&mut self, out: &mut Pieces) -> Step {
        if !self.has_name {
            return Step::Broken;
        }
        if !self.has_arguments {
            out.arguments("{}");
        }
        Step::Done
    }
}

fn is_of_a_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')
}

/// Whether the escapes in `text` are whole: a high surrogate waits for its other half.
fn is_whole_escape(text: &str) -> bool {
    match text.as_bytes() {
        [b'\\', b'u', hex @ ..] => match hex {
            [b'd' | b'D', b'8'..=b'9' | b'a' | b'b' | b'A' | b'B', _, _, rest @ ..] => match rest {
                [] | [b'\\'] => false,
                [b'\\', b'u', ..] => rest.len() >= 6,
                _ => true,
            },
            _ => hex.len() >= 4,
        },
        [b'\\', _, ..] => true,
        _ => false,
    }
}

/// The text of a JSON string's inside; as it is where that is none.
fn unescaped(inside: &str) -> String {
    serde_json::from_str(&format!("\"{inside}\"")).unwrap_or_else(|_| inside.to_owned())
}

/// How far one JSON value reaches. Only strings and brackets are looked at, and what stands outside
/// of strings and can be in no JSON.
#[derive(Debug, Default)]
struct Span {
    depth: u32,
    in_string: bool,
    escaped: bool,
    in_word: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Inside,
    /// The character is the value's last.
    Last,
    /// The value ended before the character.
    Past,
    /// The character can be in no value.
    Bad,
}

impl Span {
    /// It is a number, or true, false or null, and no list, object or string.
    fn is_word(&self) -> bool {
        self.in_word
    }

    fn step(&mut self, c: char) -> Reach {
        if self.in_string {
            if !self.escaped && c == '"' {
                self.in_string = false;
                return if self.depth == 0 { Reach::Last } else { Reach::Inside };
            }
            self.escaped = !self.escaped && c == '\\';
            return Reach::Inside;
        }
        let is_of_a_word = c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
        if self.in_word {
            return match c {
                _ if is_of_a_word => Reach::Inside,
                ',' | '}' | ']' => Reach::Past,
                _ if c.is_whitespace() => Reach::Past,
                _ => Reach::Bad,
            };
        }
        match c {
            '"' => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' if self.depth > 0 => {
                self.depth -= 1;
                if self.depth == 0 {
                    return Reach::Last;
                }
            }
            _ if is_of_a_word => self.in_word = self.depth == 0,
            ',' | ':' if self.depth > 0 => {}
            _ if c.is_whitespace() && self.depth > 0 => {}
            _ => return Reach::Bad,
        }
        Reach::Inside
    }
}
