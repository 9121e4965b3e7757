//! The kinds of constraints, by the names that users know, and how their faults are told.

use crate::error::{Error, Result};

/// What kind of text a constraint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ConstraintKind {
    /// A JSON schema.
    Json,
    /// Any JSON object.
    JsonObject,
    /// A regular expression that the whole answer matches.
    Regex,
    /// A JSON list of texts, one of which is the answer.
    Choice,
    /// A grammar in Lark's form, or in GBNF.
    Grammar,
}

impl ConstraintKind {
    /// By its name among users.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "json" => Self::Json,
            "json_object" => Self::JsonObject,
            "regex" => Self::Regex,
            "choice" => Self::Choice,
            "grammar" => Self::Grammar,
            _ => return None,
        })
    }

    /// Its name among users, with the field that it stands in.
    pub fn field(self) -> &'static str {
        match self {
            Self::Json => "structured_outputs.json",
            Self::JsonObject => "structured_outputs.json_object",
            Self::Regex => "structured_outputs.regex",
            Self::Choice => "structured_outputs.choice",
            Self::Grammar => "structured_outputs.grammar",
        }
    }

    /// An error of a constraint of this kind.
    pub(super) fn invalid(self, reason: impl std::fmt::Display) -> Error {
        let code = if self == Self::Json { "invalid_schema" } else { "invalid_grammar" };
        Error::Constraint { code, field: self.field(), message: tidy(&reason.to_string()) }
    }

    /// Checks the length of one text that answers must have, or one expression: what is compiled of a byte takes
    /// some 400.
    pub(super) fn check_literal(self, bytes: usize) -> Result<()> {
        const MOST: usize = 16 * 1024;
        if bytes > MOST {
            return Err(self.too_complex(format!("has a text of {bytes} bytes, but one may have at most {MOST}")));
        }
        Ok(())
    }

    /// An error of one that is over a limit.
    pub(super) fn too_complex(self, reason: impl std::fmt::Display) -> Error {
        Error::Constraint { code: "grammar_too_complex", field: self.field(), message: tidy(&reason.to_string()) }
    }
}

/// A message of the library in one line of bounded length, without the parts that are not for users.
fn tidy(message: &str) -> String {
    const LONGEST: usize = 300;
    let message = message.split("\n<").next().unwrap_or_default().trim();
    let message = if message.contains("NoExtension") {
        "allows no answer at all".to_owned()
    } else {
        match message.split_once("regex parse error:\n") {
            Some((before, shown)) => format!("{}{}", before_regex(before), regex_fault(shown)),
            None => message.lines().next().unwrap_or_default().to_owned(),
        }
    };
    match message.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &message[..end]),
        None => message,
    }
}

/// What stands before a regular expression's fault, but for the expression itself.
fn before_regex(before: &str) -> &str {
    before.find("invalid regex").map_or(before, |start| &before[..start])
}

/// The fault of a regular expression, with the text at which it is: the library shows both on lines
/// of their own, the place by carets.
fn regex_fault(shown: &str) -> String {
    let fault = shown.lines().find_map(|line| line.trim().strip_prefix("error: ")).unwrap_or("it cannot be read");
    let marked = shown.lines().position(|line| line.contains('^') && line.trim().bytes().all(|byte| byte == b'^'));
    let place = marked.and_then(|line| {
        let column = shown.lines().nth(line)?.find('^')?;
        let pattern = shown.lines().nth(line.checked_sub(1)?)?;
        Some(pattern.chars().skip(column).take(30).collect::<String>())
    });
    match place {
        Some(place) => format!("not a regular expression, at {place:?}: {fault}"),
        None => format!("not a regular expression: {fault}"),
    }
}
