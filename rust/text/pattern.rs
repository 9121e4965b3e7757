//! Regular expressions out of files that nobody has looked at: the work of a match is bounded.

use fancy_regex::{Regex, RegexBuilder};

/// Steps of backtracking that one match may take. Patterns without lookaround and references take
/// none: their time is linear.
const MAX_STEPS: usize = 100_000;

/// Bytes of one compiled pattern.
const MAX_COMPILED: usize = 1 << 20;

/// A pattern that must begin where the text does.
#[derive(Debug)]
pub struct Pattern(Regex);

impl Pattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn new(pattern: &str) -> Result<Self, String> {
        // Alone first: what closes the group must not count as a pattern.
        let compile = |pattern: &str| {
            let mut builder = RegexBuilder::new(pattern);
            builder.backtrack_limit(MAX_STEPS).delegate_size_limit(MAX_COMPILED).build()
        };
        compile(pattern)
            .and_then(|_| compile(&format!(r"\A(?:{pattern})")))
            .map(Self)
            .map_err(|error| error.to_string())
    }

    /// Whether the text begins with a match.
    ///
    /// # Errors
    /// The match takes too much work.
    pub fn begins(&self, text: &str) -> Result<bool, String> {
        self.0.is_match(text).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_match_begins_where_the_text_does() {
        let pattern = Pattern::new(r"model\.layers\.\d+|lm_head").unwrap();
        assert_eq!(pattern.begins("model.layers.12.mlp"), Ok(true));
        assert_eq!(pattern.begins("lm_head"), Ok(true));
        assert_eq!(pattern.begins("x.lm_head"), Ok(false));
        assert_eq!(Pattern::new("(?!.*down).*_proj").unwrap().begins("mlp.down_proj"), Ok(false));
        for wrong in ["[", "a)|(b", "(?:a{1000}){1000}"] {
            assert!(Pattern::new(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn work_is_bounded() {
        let text = "a".repeat(60);
        assert_eq!(Pattern::new("(a+)+$|(a*)*b").unwrap().begins(&text), Ok(true));
        assert_eq!(Pattern::new("(a+)+b").unwrap().begins(&text), Ok(false));
        let error = Pattern::new(r"(?=a)(a+)+\1b").unwrap().begins(&text).unwrap_err();
        assert!(error.contains("backtrack"), "{error}");
    }
}
