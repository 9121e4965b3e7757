//! What a template's source may hold, so that compiling it cannot exhaust the stack.
//!
//! minijinja bounds how deep brackets and blocks may nest, but not a chain: `----x`, `x.a.a.a` or
//! `elif` after `elif` make a tree as deep as they are long, and walking or dropping that overflows
//! the stack, which ends the process. Counted in minijinja's own tokens, so that no string or
//! comment can hide a chain.

use minijinja::machinery::{Token, Tokenizer};
use minijinja::syntax::SyntaxConfig;

use crate::error::{Error, Result};

/// Operators in one tag; published templates have up to 26.
const MAX_OPERATORS: usize = 256;
/// `elif` in a template; published ones have up to 19.
const MAX_ELIFS: usize = 256;
/// Additions in one tag; more would let minijinja copy a list of any length (see
/// `template_source`).
const MAX_ADDITIONS: usize = 32;

/// # Errors
/// [`Error::Template`] names the limit.
pub(crate) fn check(source: &str, syntax: SyntaxConfig) -> Result<()> {
    let mut tokens = Tokenizer::new(source, "", false, syntax);
    let (mut operators, mut additions, mut elifs) = (0, 0, 0);
    // What is no token is the compiler's to complain of.
    while let Ok(Some((token, _))) = tokens.next_token() {
        match token {
            Token::BlockStart | Token::VariableStart => (operators, additions) = (0, 0),
            Token::Ident("elif") => elifs += 1,
            Token::Ident("not" | "and" | "or" | "is" | "in" | "if" | "else") => operators += 1,
            Token::Plus => {
                operators += 1;
                additions += 1;
            }
            Token::TemplateData(_)
            | Token::Ident(_)
            | Token::Str(_)
            | Token::String(_)
            | Token::Int(_)
            | Token::Int128(_)
            | Token::Float(_)
            | Token::Comma
            | Token::Colon
            | Token::ParenClose
            | Token::BracketClose
            | Token::BraceClose
            | Token::BlockEnd
            | Token::VariableEnd => {}
            _ => operators += 1,
        }
        for (count, what, limit) in [
            (operators, "operators in one tag", MAX_OPERATORS),
            (additions, "additions in one tag", MAX_ADDITIONS),
            (elifs, "elif", MAX_ELIFS),
        ] {
            if count > limit {
                return Err(Error::Template(format!(
                    "chat template has more than {limit} {what}, which is not supported"
                )));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::text::{ChatTemplate, RenderOptions};

    #[test]
    fn what_is_within_the_limits_needs_little_stack() {
        let chains = [
            format!("{{{{ {}1 }}}}", "-".repeat(256)),
            format!("{{{{ {}a }}}}", "not ".repeat(256)),
            format!("{{{{ a{} }}}}", ".b".repeat(256)),
            format!("{{{{ a{} }}}}", "|e".repeat(256)),
            format!("{{{{ {}1{} }}}}", "(-".repeat(60), ")".repeat(60)),
            format!("{{% if a %}}{}{{% endif %}}", "{% elif b %}".repeat(256)),
            format!("{}{}{}", "{% if a %}".repeat(70), "{{ [[[[[[[[-1]]]]]]]] }}", "{% endif %}".repeat(70)),
        ];
        let compile = move || {
            for source in chains {
                let template = ChatTemplate::new(Some(&source), None, std::collections::BTreeMap::new());
                let _ = template.expect("it is within the limits").render(b"[]", &RenderOptions::default());
            }
        };
        // Half of what threads have by default.
        std::thread::Builder::new().stack_size(1 << 20).spawn(compile).unwrap().join().expect("no panic");
    }
}
