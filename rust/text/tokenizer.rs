//! Text to token ids and back.
//!
//! The `tokenizers` crate supplies normaliser, pre-tokeniser and model; the steps between them are
//! taken here, because a chat needs special tokens recognised at given places only (see
//! [`Specials`]). Decoding is concatenation of bytes.
//!
//! Knows nothing of templates, models or files other than `tokenizer.json` and those beside it that
//! name special tokens.

use std::collections::BTreeMap;
use std::path::Path;

use tokenizers::normalizer::Range as NormalizedRange;
use tokenizers::{
    AddedToken, Encoding, Model, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer, Token,
};

use crate::error::{Error, Result};
use crate::text::added_tokens::{AddedMatch, AddedTokens};
use crate::text::chat::SpecialFinder;
use crate::text::pieces::{ByteTable, PieceRules, Pieces};
use crate::text::special_tokens;

/// A text with something of everything.
const PROBE: &str = "Hello wörld, 42! \n e\u{301} 你好 🦜";

/// Which special tokens written out in a text count as such.
#[derive(Debug, Clone, Copy)]
pub enum Specials<'a> {
    /// All of them.
    Parse,
    /// None: `<|im_end|>` is ten ordinary characters.
    Plain,
    /// These, which were found before; none elsewhere in the text.
    At(&'a [AddedMatch]),
}

/// A tokenizer; immutable, to be shared in an `Arc`.
#[derive(Debug)]
pub struct Tokenizer {
    model: Vocabulary,
    pieces: Pieces,
    is_special: Vec<bool>,
    special_tokens: BTreeMap<String, u32>,
    drops_leading_space: bool,
    bos_token_id: Option<u32>,
    eos_token_id: Option<u32>,
    named_tokens: BTreeMap<String, String>,
}

#[derive(Debug)]
enum Vocabulary {
    /// One id per byte.
    Bytes,
    Subwords(Box<Subwords>),
}

#[derive(Debug)]
struct Subwords {
    pipeline: tokenizers::Tokenizer,
    /// What a client's text may not write; `None` without special tokens.
    specials: Option<SpecialFinder>,
    /// Added tokens that count where a template writes them.
    written_tokens: AddedTokens,
    /// Added tokens looked for in the text as it is.
    raw_tokens: AddedTokens,
    /// Added tokens looked for in the normalised text.
    normalized_tokens: AddedTokens,
    /// What `add_special_tokens` puts before and after a text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`, and what the files beside it say of special tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`]: a file that cannot be read, or a decoder that is not known (see
    /// `pieces`).
    pub fn from_file(path: &Path) -> Result<Self> {
        special_tokens::check_size_of_file(path)?;
        let mut pipeline = tokenizers::Tokenizer::from_file(path)
            .map_err(|error| Error::Tokenizer(format!("{}: {error}", path.display())))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let named_tokens = special_tokens::add_from_folder(&mut pipeline, folder)?;
        let id = |name: &str| named_tokens.get(name).and_then(|token| pipeline.token_to_id(token));
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        let mut tokenizer = Self::from_pipeline(pipeline, bos, eos)?;
        tokenizer.set_named_tokens(named_tokens);
        // What makes the library panic on any text is better found now. An error may be the text's.
        let _ = tokenizer.encode_text(PROBE, true, Specials::Parse);
        Ok(tokenizer)
    }

    /// Wraps a tokenizer of the `tokenizers` crate. Truncation and padding are switched off.
    ///
    /// # Errors
    /// [`Error::Tokenizer`]: a decoder that is not known, or ids far beyond the number of tokens.
    pub fn from_pipeline(
        mut pipeline: tokenizers::Tokenizer,
        bos_token_id: Option<u32>,
        eos_token_id: Option<u32>,
    ) -> Result<Self> {
        pipeline.with_padding(None);
        pipeline.with_truncation(None).map_err(tokenizer_error)?;
        let decoder = serde_json::to_value(pipeline.get_decoder()).map_err(tokenizer_error)?;
        let rules = PieceRules::from_decoder(&decoder)?;

        let added = pipeline.get_added_tokens_decoder();
        let vocabulary = pipeline.get_vocab(true);
        let num_ids = vocabulary.values().map(|&id| id as usize + 1).max().unwrap_or(0);
        // The table of ids is as long as the largest one says, so that one must be believable.
        let limit = 4 * vocabulary.len() + 4096;
        if num_ids > limit {
            return Err(Error::Tokenizer(format!(
                "tokenizer: largest token id {} is over the limit of {limit} for {} tokens",
                num_ids - 1,
                vocabulary.len()
            )));
        }
        let mut tokens: Vec<Option<&str>> = vec![None; num_ids];
        for (token, &id) in &vocabulary {
            tokens[id as usize] = Some(token);
        }
        let table = ByteTable::new();
        let mut pieces = Pieces::default();
        let mut is_special = vec![false; num_ids];
        for (id, token) in tokens.iter().enumerate() {
            match (added.get(&(id as u32)), token) {
                (Some(added), _) => {
                    match normalized(&pipeline, added)? {
                        // An added token is text as it stands, whatever the decoder,
                        text if text == added.content => pieces.push(text.as_bytes()),
                        // unless it is looked for in another form, which the decoder turns back.
                        text => pieces.push(&rules.bytes(&text, &table)),
                    }
                    is_special[id] = added.special;
                }
                (None, Some(token)) => pieces.push(&rules.bytes(token, &table)),
                (None, None) => pieces.push(&[]),
            }
        }
        let special_tokens =
            added.iter().filter(|(_, token)| token.special).map(|(&id, token)| (token.content.clone(), id)).collect();
        Ok(Self {
            model: Vocabulary::Subwords(Box::new(Subwords::new(pipeline)?)),
            pieces,
            is_special,
            special_tokens,
            drops_leading_space: rules.drop_leading_space,
            bos_token_id,
            eos_token_id,
            named_tokens: BTreeMap::new(),
        })
    }

    pub(crate) fn set_named_tokens(&mut self, named_tokens: BTreeMap<String, String>) {
        self.named_tokens = named_tokens;
    }

    /// Replaces what `add_special_tokens` puts before and after a text.
    pub(crate) fn set_surrounding_tokens(&mut self, prefix: Vec<u32>, suffix: Vec<u32>) {
        if let Vocabulary::Subwords(subwords) = &mut self.model {
            subwords.prefix = prefix;
            subwords.suffix = suffix;
        }
    }

    /// One id per byte of UTF-8: for tests and for models without a tokenizer. Ids from 256 on
    /// decode to nothing.
    pub fn bytes_only(vocab_size: usize) -> Self {
        let mut pieces = Pieces::default();
        for id in 0..vocab_size {
            match u8::try_from(id) {
                Ok(byte) => pieces.push(&[byte]),
                Err(_) => pieces.push(&[]),
            }
        }
        Self {
            model: Vocabulary::Bytes,
            pieces,
            is_special: vec![false; vocab_size],
            special_tokens: BTreeMap::new(),
            drops_leading_space: false,
            bos_token_id: None,
            eos_token_id: None,
            named_tokens: BTreeMap::new(),
        }
    }

    /// Largest id + 1.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// Id of the token that begins a sequence.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos_token_id
    }

    /// Id of the token that ends a sequence.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos_token_id
    }

    /// Special tokens by the names under which templates know them, such as `bos_token`.
    pub fn named_tokens(&self) -> &BTreeMap<String, String> {
        &self.named_tokens
    }

    /// Special tokens by text.
    pub fn special_tokens(&self) -> &BTreeMap<String, u32> {
        &self.special_tokens
    }

    /// Decoded text loses one leading space (SentencePiece's dummy prefix).
    pub fn drops_leading_space(&self) -> bool {
        self.drops_leading_space
    }

    /// Whether `id` is a special token, which `skip_special` leaves out of decoded text.
    pub fn is_special(&self, id: u32) -> bool {
        self.is_special.get(id as usize).copied().unwrap_or(false)
    }

    /// The bytes `id` stands for; empty for an unknown id.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.pieces.get(id)
    }

    /// Characters of the longest token, as text that is tokenised has them.
    pub fn longest_token(&self) -> usize {
        let characters = |id| self.token_bytes(id).iter().filter(|byte| **byte & 0xC0 != 0x80).count();
        (0..self.vocab_size() as u32).map(characters).max().unwrap_or(0)
    }

    /// Id of a token as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.model {
            Vocabulary::Bytes => None,
            Vocabulary::Subwords(subwords) => subwords.pipeline.token_to_id(token),
        }
    }

    /// A token as the vocabulary spells it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.model {
            Vocabulary::Bytes => None,
            Vocabulary::Subwords(subwords) => subwords.pipeline.id_to_token(id),
        }
    }

    /// As `tokenizer.json` has it, without what is put before and after a text; `None` for ids of
    /// bytes.
    ///
    /// # Errors
    /// [`Error::Tokenizer`]: a part of it cannot be written.
    pub fn to_json(&self) -> Result<Option<String>> {
        match &self.model {
            Vocabulary::Bytes => Ok(None),
            Vocabulary::Subwords(subwords) => subwords.pipeline.to_string(false).map(Some).map_err(tokenizer_error),
        }
    }

    /// Tokenises `text`. `add_special_tokens` adds what the tokenizer adds to every text (often
    /// BOS).
    ///
    /// # Errors
    /// [`Error::Tokenizer`]: the model of the tokenizer cannot express the text.
    pub fn encode_text(&self, text: &str, add_special_tokens: bool, specials: Specials) -> Result<Vec<u32>> {
        match &self.model {
            Vocabulary::Bytes => {
                let known = |&byte: &u8| usize::from(byte) < self.vocab_size();
                Ok(text.bytes().filter(known).map(u32::from).collect())
            }
            Vocabulary::Subwords(subwords) => {
                let mut ids = Vec::with_capacity(text.len() / 3 + 8);
                if add_special_tokens {
                    ids.extend_from_slice(&subwords.prefix);
                }
                subwords.encode(text, specials, |id| self.is_special(id), &mut ids)?;
                if add_special_tokens {
                    ids.extend_from_slice(&subwords.suffix);
                }
                Ok(ids)
            }
        }
    }

    /// Every added token that a template wrote into `text`.
    pub(crate) fn find_added_tokens(&self, text: &str) -> Vec<AddedMatch> {
        match &self.model {
            Vocabulary::Bytes => Vec::new(),
            Vocabulary::Subwords(subwords) => subwords.written_tokens.find(text, true),
        }
    }

    /// Finds special tokens in what a client wrote.
    pub(crate) fn special_finder(&self) -> Option<&SpecialFinder> {
        match &self.model {
            Vocabulary::Bytes => None,
            Vocabulary::Subwords(subwords) => subwords.specials.as_ref(),
        }
    }

    /// The text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids without a piece add nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            if !(skip_special && self.is_special(id)) {
                bytes.extend_from_slice(self.token_bytes(id));
            }
        }
        let text = if self.drops_leading_space { bytes.strip_prefix(b" ").unwrap_or(&bytes) } else { &bytes };
        String::from_utf8_lossy(text).into_owned()
    }

    /// Whether a prompt ends with `end`, special tokens included, and blanks behind it. Only its
    /// last 32 tokens are looked at.
    pub fn ends_with(&self, ids: &[u32], end: &str) -> bool {
        let tail = &ids[ids.len().saturating_sub(32)..];
        self.decode(tail, false).trim_end().ends_with(end)
    }
}

impl Subwords {
    fn new(pipeline: tokenizers::Tokenizer) -> Result<Self> {
        let mut raw = Vec::new();
        let mut in_normalized = Vec::new();
        let mut written = Vec::new();
        let added = pipeline.get_added_tokens_decoder();
        let specials = added.values().filter(|token| token.special).map(|token| token.content.as_str());
        let specials = SpecialFinder::new(specials)?;
        for (id, token) in added {
            if token.special || !token.normalized {
                written.push((token.content.clone(), id, token.clone()));
            }
            if !token.normalized {
                raw.push((token.content.clone(), id, token));
                continue;
            }
            in_normalized.push((normalized(&pipeline, &token)?, id, token));
        }
        let (prefix, suffix) = surrounding_tokens(&pipeline)?;
        Ok(Self {
            specials,
            written_tokens: AddedTokens::new(written)?,
            raw_tokens: AddedTokens::new(raw)?,
            normalized_tokens: AddedTokens::new(in_normalized)?,
            pipeline,
            prefix,
            suffix,
        })
    }

    fn encode(
        &self,
        text: &str,
        specials: Specials,
        is_special: impl Fn(u32) -> bool,
        ids: &mut Vec<u32>,
    ) -> Result<()> {
        let mut text = PreTokenizedString::from(text);
        if let Specials::At(matches) = specials {
            text.split(|_, part| Ok(cut(&part, matches))).map_err(tokenizer_error)?;
        }
        let parse = matches!(specials, Specials::Parse);
        text.split(|_, part| Ok(cut(&part, &self.raw_tokens.find(part.get(), parse)))).map_err(tokenizer_error)?;
        text.split(|_, mut part| {
            if let Some(normalizer) = self.pipeline.get_normalizer() {
                normalizer.normalize(&mut part)?;
            }
            Ok(cut(&part, &self.normalized_tokens.find(part.get(), parse)))
        })
        .map_err(tokenizer_error)?;
        if let Some(pre_tokenizer) = self.pipeline.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut text).map_err(tokenizer_error)?;
        }
        text.tokenize(|part| self.tokenize_plain(part.get(), &is_special)).map_err(tokenizer_error)?;
        for (_, _, tokens) in text.get_splits(OffsetReferential::Original, OffsetType::None) {
            ids.extend(tokens.iter().flatten().map(|token| token.id));
        }
        Ok(())
    }

    /// Tokenises a part that holds no added token.
    ///
    /// Vocabularies list special tokens too, so merges (or `ignore_merges`) could spell one out of
    /// ordinary characters. Such a part is tokenised one character at a time instead.
    fn tokenize_plain(&self, part: &str, is_special: &impl Fn(u32) -> bool) -> tokenizers::Result<Vec<Token>> {
        let model = self.pipeline.get_model();
        let tokens = model.tokenize(part)?;
        // Spelled out, unlike the unknown token, which any odd character may yield.
        let spelled = |token: &Token| {
            is_special(token.id) && model.id_to_token(token.id).is_some_and(|name| part.contains(&name))
        };
        if !tokens.iter().any(spelled) {
            return Ok(tokens);
        }
        let mut buffer = [0; 4];
        let mut tokens = Vec::new();
        for c in part.chars() {
            tokens.extend(model.tokenize(c.encode_utf8(&mut buffer))?);
        }
        tokens.retain(|token| !spelled(token));
        Ok(tokens)
    }
}

/// The form in which an added token is looked for.
fn normalized(pipeline: &tokenizers::Tokenizer, token: &AddedToken) -> Result<String> {
    let mut text = NormalizedString::from(token.content.as_str());
    if let Some(normalizer) = pipeline.get_normalizer().filter(|_| token.normalized) {
        normalizer.normalize(&mut text).map_err(tokenizer_error)?;
    }
    Ok(text.get().to_owned())
}

/// Cuts `part` at the added tokens found in it; a match outside it is left out.
fn cut(part: &NormalizedString, matches: &[AddedMatch]) -> Vec<(NormalizedString, Option<Vec<Token>>)> {
    let slice = |start, end| {
        part.slice(NormalizedRange::Normalized(start..end)).expect("matches lie on character borders inside the part")
    };
    let mut parts = Vec::with_capacity(2 * matches.len() + 1);
    let mut start = 0;
    for AddedMatch { range, id, .. } in matches {
        if start < range.start {
            parts.push((slice(start, range.start), None));
        }
        let text = slice(range.start, range.end);
        let token = Token::new(*id, text.get().to_owned(), (0, range.len()));
        parts.push((text, Some(vec![token])));
        start = range.end;
    }
    if start < part.len() {
        parts.push((slice(start, part.len()), None));
    }
    parts
}

/// The ids that the post-processor puts before and after a text: seen by letting it process one
/// token.
fn surrounding_tokens(pipeline: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
    const MARK: u32 = u32::MAX;
    let mark = Encoding::from_tokens(vec![Token::new(MARK, String::new(), (0, 0))], 0);
    let processed = pipeline.post_process(mark, None, true).map_err(tokenizer_error)?;
    let mut around = processed.get_ids().split(|&id| id == MARK);
    match (around.next(), around.next(), around.next()) {
        (Some(before), Some(after), None) => Ok((before.to_vec(), after.to_vec())),
        _ => Err(Error::Tokenizer("tokenizer.json: the post_processor must keep the text once".to_owned())),
    }
}

fn tokenizer_error(error: impl std::fmt::Display) -> Error {
    Error::Tokenizer(format!("tokenizer: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_only_round_trips() {
        let tokenizer = Tokenizer::bytes_only(300);
        let ids = tokenizer.encode_text("aé", true, Specials::Parse).unwrap();
        assert_eq!(ids, [97, 0xC3, 0xA9]);
        assert_eq!(tokenizer.decode(&[97, 0xC3, 299, 0xA9, 5000], true), "aé");
    }
}
