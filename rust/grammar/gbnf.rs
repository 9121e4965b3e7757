//! GBNF, the grammars of llama.cpp, which vLLM's users write as well: read, checked, and written
//! again as Lark.
//!
//! A rule that is not recursive becomes a terminal, which is a regular expression to the library:
//! of a grammar without recursion all is exact. What is recursive becomes rules over terminals, and
//! those are cut from the text by longest match, as everywhere in Lark.

use std::fmt::Write;

use rustc_hash::FxHashMap;

use super::choice::quote;
use super::kind::ConstraintKind;
use crate::error::Result;

/// Most repetitions that a grammar may ask for.
const MAX_REPEAT: u32 = 100_000;
/// Most rules.
const MAX_RULES: usize = 2000;

/// A part of a rule's right side.
#[derive(Debug)]
enum Node {
    Text(String),
    /// Characters from, to; or all others.
    Class(Vec<(char, char)>, bool),
    Rule(usize),
    Sequence(Vec<Node>),
    Either(Vec<Node>),
    Repeat(Box<Node>, u32, Option<u32>),
}

/// A rule by number; without a right side as long as it was only named.
#[derive(Debug)]
struct Rule {
    name: String,
    /// Line where it was first named.
    line: usize,
    body: Option<Node>,
}

/// Whether a grammar is GBNF: a line begins with a name and `::=`.
pub(super) fn is_gbnf(text: &str) -> bool {
    text.lines().any(|line| {
        let line = line.trim_start();
        let name = line.find(|letter| !is_name(letter)).unwrap_or(line.len());
        name > 0 && line[name..].trim_start().starts_with("::=")
    })
}

/// The same grammar in Lark's form.
pub(super) fn to_lark(text: &str) -> Result<String> {
    let mut parser = Parser { text, at: 0, rules: Vec::new(), numbers: FxHashMap::default() };
    let rules = parser.grammar().map_err(|reason| ConstraintKind::Grammar.invalid(reason))?;
    Ok(Writer::new(&rules).grammar())
}

fn is_name(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '-' || letter == '_'
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    rules: Vec<Rule>,
    numbers: FxHashMap<String, usize>,
}

type Parsed<T> = std::result::Result<T, String>;

impl Parser<'_> {
    /// All rules, the root first.
    fn grammar(&mut self) -> Parsed<Vec<Rule>> {
        self.rule_number("root");
        self.skip(true);
        while self.peek().is_some() {
            let line = self.line();
            let name = self.name();
            if name.is_empty() {
                return Err(self.expected("the name of a rule"));
            }
            self.skip(false);
            if !self.take("::=") {
                return Err(self.expected("::="));
            }
            self.skip(true);
            let body = self.either(false)?;
            let number = self.rule_number(&name);
            let rule = &mut self.rules[number];
            if rule.body.is_some() {
                return Err(format!("line {line}: rule {name:?} is there twice"));
            }
            rule.body = Some(body);
            if self.rules.len() > MAX_RULES {
                return Err(format!("has more than {MAX_RULES} rules, the limit"));
            }
            self.skip(true);
        }
        if let Some(missing) = self.rules.iter().find(|rule| rule.body.is_none()) {
            return Err(if missing.name == "root" {
                "has no rule \"root\", at which a grammar begins".to_owned()
            } else {
                format!("line {}: there is no rule {:?}", missing.line, missing.name)
            });
        }
        Ok(std::mem::take(&mut self.rules))
    }

    fn rule_number(&mut self, name: &str) -> usize {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let number = self.rules.len();
        self.numbers.insert(name.to_owned(), number);
        self.rules.push(Rule { name: name.to_owned(), line: self.line(), body: None });
        number
    }

    /// nested: inside of brackets, where lines may end.
    fn either(&mut self, nested: bool) -> Parsed<Node> {
        let mut choices = vec![self.sequence(nested)?];
        loop {
            self.skip(true); // the next line may go on with another choice
            if !self.take("|") {
                break;
            }
            self.skip(true);
            choices.push(self.sequence(nested)?);
        }
        Ok(if choices.len() == 1 { choices.remove(0) } else { Node::Either(choices) })
    }

    fn sequence(&mut self, nested: bool) -> Parsed<Node> {
        let mut parts = Vec::new();
        loop {
            let part = match self.peek() {
                Some('"') => Node::Text(self.literal()?),
                Some('[') => self.class()?,
                Some('.') => {
                    self.at += 1;
                    Node::Class(vec![('\n', '\n')], true)
                }
                Some('(') => {
                    self.at += 1;
                    self.skip(true);
                    let inner = self.either(true)?;
                    if !self.take(")") {
                        return Err(self.expected(")"));
                    }
                    inner
                }
                Some(letter) if is_name(letter) => {
                    let name = self.name();
                    Node::Rule(self.rule_number(&name))
                }
                _ => break,
            };
            parts.push(self.repeated(part)?);
            self.skip(nested);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Node::Sequence(parts) })
    }

    fn repeated(&mut self, mut part: Node) -> Parsed<Node> {
        loop {
            let (least, most) = match self.peek() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => {
                    self.at += 1;
                    let least = self.number()?;
                    let most = if self.take(",") { self.number()? } else { least };
                    if self.peek() != Some('}') || (least.is_none() && most.is_none()) {
                        return Err(self.expected("{least,most}"));
                    }
                    (least.unwrap_or(0), most)
                }
                _ => return Ok(part),
            };
            self.at += 1;
            if most.is_some_and(|most| most < least) {
                return Err(format!("line {}: at least {least} times, but fewer at most", self.line()));
            }
            part = Node::Repeat(Box::new(part), least, most);
        }
    }

    fn number(&mut self) -> Parsed<Option<u32>> {
        let digits: String = self.text[self.at..].chars().take_while(char::is_ascii_digit).collect();
        self.at += digits.len();
        if digits.is_empty() {
            return Ok(None);
        }
        let number = digits.parse().ok().filter(|number| *number <= MAX_REPEAT);
        number.map(Some).ok_or_else(|| format!("line {}: more than {MAX_REPEAT} times", self.line()))
    }

    fn literal(&mut self) -> Parsed<String> {
        self.at += 1;
        let mut text = String::new();
        loop {
            match self.peek() {
                Some('"') => {
                    self.at += 1;
                    return Ok(text);
                }
                Some(_) => text.push(self.character()?),
                None => return Err(self.expected("\" at the end of a text")),
            }
        }
    }

    fn class(&mut self) -> Parsed<Node> {
        self.at += 1;
        let negated = self.take("^");
        let mut ranges = Vec::new();
        while self.peek() != Some(']') {
            let first = self.character()?;
            let is_range = self.peek() == Some('-') && !self.text[self.at + 1..].starts_with(']');
            let last = if is_range {
                self.at += 1;
                self.character()?
            } else {
                first
            };
            if last < first {
                return Err(format!("line {}: the range {first}-{last} is empty", self.line()));
            }
            ranges.push((first, last));
        }
        self.at += 1;
        if ranges.is_empty() {
            return Err(format!("line {}: a class without characters", self.line()));
        }
        Ok(Node::Class(ranges, negated))
    }

    /// One character of a text or class, escapes undone.
    fn character(&mut self) -> Parsed<char> {
        let Some(letter) = self.peek() else { return Err(self.expected("a character")) };
        self.at += letter.len_utf8();
        if letter != '\\' {
            return Ok(letter);
        }
        let Some(kind) = self.peek() else { return Err(self.expected("a character after \\")) };
        self.at += kind.len_utf8();
        let digits = match kind {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            'n' => return Ok('\n'),
            'r' => return Ok('\r'),
            't' => return Ok('\t'),
            '\\' | '"' | '[' | ']' | '-' | '^' | '/' | '\'' => return Ok(kind),
            other => return Err(format!("line {}: \\{other} is no escape", self.line())),
        };
        let code = self.text.get(self.at..self.at + digits).and_then(|code| u32::from_str_radix(code, 16).ok());
        self.at += digits;
        code.and_then(char::from_u32).ok_or_else(|| format!("line {}: \\{kind} names no character", self.line()))
    }

    fn name(&mut self) -> String {
        let name: String = self.text[self.at..].chars().take_while(|letter| is_name(*letter)).collect();
        self.at += name.len();
        name
    }

    /// Goes past blanks and comments, and past line ends where these do not count.
    fn skip(&mut self, lines: bool) {
        while let Some(letter) = self.peek() {
            match letter {
                '#' => self.at += self.text[self.at..].find('\n').unwrap_or(self.text.len() - self.at),
                '\n' | '\r' if !lines => break,
                letter if letter.is_whitespace() => self.at += letter.len_utf8(),
                _ => break,
            }
        }
    }

    fn take(&mut self, text: &str) -> bool {
        let is_next = self.text[self.at..].starts_with(text);
        self.at += if is_next { text.len() } else { 0 };
        is_next
    }

    fn peek(&self) -> Option<char> {
        self.text.get(self.at..)?.chars().next()
    }

    fn line(&self) -> usize {
        1 + self.text[..self.at.min(self.text.len())].matches('\n').count()
    }

    fn expected(&self, what: &str) -> String {
        match self.peek() {
            Some(found) => format!("line {}: expected {what}, found {found:?}", self.line()),
            None => format!("line {}: expected {what}, found the end", self.line()),
        }
    }
}

struct Writer<'a> {
    rules: &'a [Rule],
    /// Rules name these as terminals.
    terminal: Vec<bool>,
    /// Written as terminals: those, and what these name.
    written: Vec<bool>,
}

impl<'a> Writer<'a> {
    fn new(rules: &'a [Rule]) -> Self {
        let named_by: Vec<Vec<usize>> = rules.iter().map(|rule| rule.body.as_ref().map_or(vec![], named)).collect();
        let reached: Vec<Vec<usize>> = (0..rules.len()).map(|rule| all_reached(rule, &named_by)).collect();
        let recursive: Vec<bool> = (0..rules.len()).map(|rule| reached[rule].contains(&rule)).collect();
        let plain = |rule: usize| !recursive[rule] && !reached[rule].iter().any(|other| recursive[*other]);
        // A terminal must not be empty where it stands among others; one that is all there is may be.
        let is_regular = plain(0);
        let mut writer = Self { rules, terminal: Vec::new(), written: vec![false; rules.len()] };
        writer.terminal =
            (0..rules.len()).map(|rule| plain(rule) && (is_regular || !writer.may_be_empty(rule))).collect();
        for rule in (0..rules.len()).filter(|rule| writer.terminal[*rule]) {
            writer.written[rule] = true;
            reached[rule].iter().for_each(|other| writer.written[*other] = true);
        }
        writer
    }

    fn grammar(&self) -> String {
        let mut out = format!("start: {}\n", name(0, self.terminal[0]));
        for (number, rule) in self.rules.iter().enumerate() {
            let body = rule.body.as_ref().expect("a rule without a body was refused");
            for as_terminal in [false, true] {
                if if as_terminal { self.written[number] } else { !self.terminal[number] } {
                    let _ = write!(out, "{}: ", name(number, as_terminal));
                    self.write(body, as_terminal, &mut out);
                    out.push('\n');
                }
            }
        }
        out
    }

    fn write(&self, node: &Node, as_terminal: bool, out: &mut String) {
        match node {
            Node::Text(text) => quote(text, out),
            Node::Class(ranges, negated) => {
                out.push_str(if *negated { "/[^" } else { "/[" });
                for (first, last) in ranges {
                    let _ = write!(out, r"\x{{{:X}}}-\x{{{:X}}}", *first as u32, *last as u32);
                }
                out.push_str("]/");
            }
            Node::Rule(number) => out.push_str(&name(*number, as_terminal || self.terminal[*number])),
            Node::Sequence(parts) if parts.is_empty() => out.push_str("\"\""),
            Node::Sequence(parts) => self.write_list(parts, " ", as_terminal, out),
            Node::Either(choices) => self.write_list(choices, " | ", as_terminal, out),
            Node::Repeat(part, least, most) => {
                out.push('(');
                self.write(part, as_terminal, out);
                out.push(')');
                match (least, most) {
                    (0, None) => out.push('*'),
                    (1, None) => out.push('+'),
                    (0, Some(1)) => out.push('?'),
                    (least, None) => drop(write!(out, "{{{least},}}")),
                    (least, Some(most)) => drop(write!(out, "{{{least},{most}}}")),
                }
            }
        }
    }

    fn write_list(&self, parts: &[Node], between: &str, as_terminal: bool, out: &mut String) {
        out.push('(');
        for (index, part) in parts.iter().enumerate() {
            if index > 0 {
                out.push_str(between);
            }
            self.write(part, as_terminal, out);
        }
        out.push(')');
    }

    /// Of a rule that is not recursive.
    fn may_be_empty(&self, rule: usize) -> bool {
        self.rules[rule].body.as_ref().is_some_and(|body| self.is_empty(body))
    }

    fn is_empty(&self, node: &Node) -> bool {
        match node {
            Node::Text(text) => text.is_empty(),
            Node::Class(..) => false,
            Node::Rule(rule) => self.may_be_empty(*rule),
            Node::Sequence(parts) => parts.iter().all(|part| self.is_empty(part)),
            Node::Either(choices) => choices.iter().any(|choice| self.is_empty(choice)),
            Node::Repeat(part, least, _) => *least == 0 || self.is_empty(part),
        }
    }
}

/// The rules that a part names.
fn named(node: &Node) -> Vec<usize> {
    match node {
        Node::Text(_) | Node::Class(..) => Vec::new(),
        Node::Rule(number) => vec![*number],
        Node::Sequence(parts) | Node::Either(parts) => parts.iter().flat_map(named).collect(),
        Node::Repeat(part, ..) => named(part),
    }
}

fn all_reached(rule: usize, reaches: &[Vec<usize>]) -> Vec<usize> {
    let mut seen = vec![false; reaches.len()];
    let mut waiting = reaches[rule].clone();
    while let Some(next) = waiting.pop() {
        if !std::mem::replace(&mut seen[next], true) {
            waiting.extend_from_slice(&reaches[next]);
        }
    }
    (0..reaches.len()).filter(|rule| seen[*rule]).collect()
}

fn name(number: usize, as_terminal: bool) -> String {
    format!("{}{number}", if as_terminal { "R" } else { "r" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_recursive_becomes_terminals() {
        let lark =
            to_lark("root ::= a | b # choice\na ::= \"x\\n\" [^a-c\\x41]+\nb ::= .{2,3} (\"y\" |\n \"z\")?").unwrap();
        assert_eq!(
            lark,
            "start: R0\nR0: (R1 | R2)\nR1: (\"x\\n\" (/[^\\x{61}-\\x{63}\\x{41}-\\x{41}]/)+)\n\
             R2: ((/[^\\x{A}-\\x{A}]/){2,3} ((\"y\" | \"z\"))?)\n"
        );
    }

    #[test]
    fn what_is_recursive_stays_rules_over_terminals() {
        let lark = to_lark("root ::= \"(\" ws root ws \")\" | digits\ndigits ::= [0-9]+ ws\nws ::= \" \"*").unwrap();
        assert_eq!(
            lark,
            "start: r0\nr0: ((\"(\" r1 r0 r1 \")\") | R2)\nr1: (\" \")*\nR1: (\" \")*\n\
             R2: ((/[\\x{30}-\\x{39}]/)+ R1)\n"
        );
    }

    #[test]
    fn faults_name_their_line() {
        for (text, fault) in [
            ("a ::= \"x\"", "no rule \"root\""),
            ("root ::= \"x\"\n\nroot ::= b", "line 3: rule \"root\" is there twice"),
            ("root ::= \"x\"\n | b", "line 2: there is no rule \"b\""),
            ("root ::= (\"x\"", "line 1: expected ), found the end"),
            ("root ::= \"x", "line 1: expected \" at the end of a text"),
            ("root ::= [z-a]", "line 1: the range z-a is empty"),
            ("root ::= []", "line 1: a class without characters"),
            ("root ::= \"\\q\"", "line 1: \\q is no escape"),
            ("root ::= \"x\"{3,2}", "line 1: at least 3 times"),
            ("root ::= \"x\"{1000000}", "line 1: more than 100000 times"),
            ("root ::= \"x\"\n= 5", "line 2: expected the name of a rule, found '='"),
        ] {
            let error = to_lark(text).unwrap_err().to_string();
            assert!(error.contains(fault), "{text}: {error}");
        }
    }
}
