//! Text work: everything between a client's characters and token ids, in both directions.
//!
//! In: [`ChatTemplate`] renders messages, [`Tokenizer`] turns text into ids. Out: [`Detokenizer`]
//! turns ids into text as they come, [`StopMatcher`] cuts it at stop strings, and [`answer`] tells
//! reasoning, content and calls of tools apart. Nothing here knows of requests, the scheduler or
//! Python.

mod added_tokens;
pub mod answer;
mod chat;
mod clock;
mod detokenize;
mod gguf_vocab;
mod json;
mod pattern;
mod pieces;
mod python_methods;
mod python_values;
mod rendered_text;
mod special_tokens;
mod stop;
mod template;
mod template_limits;
mod template_source;
mod tokenizer;

pub use detokenize::Detokenizer;
pub use pattern::Pattern;
pub use stop::{StopHit, StopMatcher, StopPatterns};
pub use template::{ChatTemplate, RenderOptions};
pub use tokenizer::{Specials, Tokenizer};
