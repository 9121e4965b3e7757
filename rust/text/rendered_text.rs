//! What a chat template writes, as far as it may: the messages are bounded before, but a template
//! can write them any number of times.

use std::io;

use crate::error::{Error, Result};

/// Takes a template's output until it is too long.
#[derive(Debug)]
pub(crate) struct RenderedText {
    text: Vec<u8>,
    characters: usize,
    most: Option<usize>,
}

impl RenderedText {
    /// `most` characters are taken.
    pub fn new(most: Option<usize>) -> Self {
        Self { text: Vec::new(), characters: 0, most }
    }

    /// The text, unless it is too long or the template failed otherwise.
    ///
    /// # Errors
    /// [`Error::RenderedTooLong`], or that of `rendered`.
    pub fn finish(self, rendered: Result<()>) -> Result<String> {
        match self.most.filter(|most| self.characters > *most) {
            Some(limit) => Err(Error::RenderedTooLong { limit }),
            None => rendered.map(|()| String::from_utf8(self.text).expect("templates write text")),
        }
    }
}

impl io::Write for RenderedText {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.characters += part.iter().filter(|byte| **byte & 0xC0 != 0x80).count();
        if self.most.is_some_and(|most| self.characters > most) {
            return Err(io::Error::other("the text is too long"));
        }
        self.text.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
