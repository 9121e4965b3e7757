//! A constraint as users write it, and its bounds.

use llguidance::api::TopLevelGrammar;

use super::choice;
use super::combined;
use super::gbnf;
use super::kind::ConstraintKind;
use super::schema::{self, Whitespace};
use crate::error::Result;

/// Most bytes of a constraint's text.
pub const MAX_TEXT: usize = 256 * 1024;
/// Deepest brackets of a regular expression or grammar: compilers go down by recursion.
const MAX_NESTING: usize = 200;

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Constraint {
    /// What `text` is.
    pub kind: ConstraintKind,
    /// The schema, expression, list or grammar; nothing for [`ConstraintKind::JsonObject`].
    pub text: String,
    /// Of JSON; other kinds say themselves where white space may be.
    pub whitespace: Whitespace,
}

impl Constraint {
    /// Checks the bounds, and makes of it what `llguidance` reads.
    ///
    /// # Errors
    /// [`Error::Constraint`].
    pub(super) fn prepared(&self) -> Result<TopLevelGrammar> {
        let kind = self.kind;
        if self.text.len() > MAX_TEXT {
            return Err(kind.too_complex(format!("has {} bytes, but must have at most {MAX_TEXT}", self.text.len())));
        }
        match kind {
            ConstraintKind::Json => {
                if let Whitespace::Pattern(pattern) = &self.whitespace {
                    kind.check_literal(pattern.len())?;
                }
                let schema = schema::read(&self.text)?;
                Ok(TopLevelGrammar::from_json_schema(schema::with_options(schema, &self.whitespace)))
            }
            ConstraintKind::JsonObject => {
                let schema = serde_json::json!({"type": "object"});
                Ok(TopLevelGrammar::from_json_schema(schema::with_options(schema, &self.whitespace)))
            }
            ConstraintKind::Regex => {
                check_nesting(kind, &self.text)?;
                kind.check_literal(self.text.len())?;
                if self.text.is_empty() {
                    return Err(kind.invalid("is empty: no answer but the empty one would match"));
                }
                Ok(TopLevelGrammar::from_regex(&self.text))
            }
            ConstraintKind::Choice => choice::grammar(&self.text),
            ConstraintKind::Grammar => {
                check_nesting(kind, &self.text)?;
                self.text.split('"').try_for_each(|piece| kind.check_literal(piece.len()))?;
                if self.text.trim().is_empty() {
                    return Err(kind.invalid("is empty"));
                }
                let is_gbnf = gbnf::is_gbnf(&self.text);
                let lark = if is_gbnf { gbnf::to_lark(&self.text)? } else { self.text.clone() };
                combined::check_lark(&lark)?;
                Ok(TopLevelGrammar::from_lark(lark))
            }
        }
    }
}

/// Refuses brackets deeper than [`MAX_NESTING`], counted without an eye for quotes and escapes.
fn check_nesting(kind: ConstraintKind, text: &str) -> Result<()> {
    let (mut depth, mut deepest) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    if deepest > MAX_NESTING {
        return Err(
            kind.too_complex(format!("has brackets {deepest} deep, but they must be at most {MAX_NESTING} deep"))
        );
    }
    Ok(())
}
