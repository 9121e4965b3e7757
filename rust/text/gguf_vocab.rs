//! A tokenizer from the vocabulary in a GGUF file (`tokenizer.ggml.*`).
//!
//! Two kinds: `gpt2` is byte-level BPE, whose pre-tokeniser the file names (`tokenizer.ggml.pre`);
//! `llama` is SentencePiece BPE, which merges whatever gives the piece of highest score and falls
//! back to bytes. Both become a pipeline of the `tokenizers` crate. Sources: llama.cpp's
//! `llama-vocab.cpp` for the meaning of the keys; the `tokenizer.json` published with each model
//! family for the pre-tokenisers.

use std::collections::BTreeMap;

use serde_json::json;
use tokenizers::models::bpe::{Vocab, BPE};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper};

use crate::error::Result;
use crate::gguf::{GgufFile, Kind, Value};
use crate::text::special_tokens::check_size;
use crate::text::Tokenizer;

/// `tokenizer.ggml.token_type`.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Names in templates, and those in the file's keys.
const OTHER_NAMED: [(&str, &str); 5] = [
    ("unk_token", "unknown"),
    ("sep_token", "seperator"), // as llama.cpp spells it
    ("pad_token", "padding"),
    ("cls_token", "cls"),
    ("mask_token", "mask"),
];

/// Longest piece that scores may build, in characters: finding the pairs that make it costs its
/// length squared.
const MAX_PIECE_CHARS: usize = 128;

/// Splits of Llama 3 and Qwen 2, which differ in how many digits make a group.
const WORDS_BEFORE_DIGITS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|";
const WORDS_AFTER_DIGITS: &str = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl Tokenizer {
    /// Builds the tokenizer of a GGUF file.
    ///
    /// # Errors
    /// [`crate::error::Error::Gguf`] names the file and the key at fault.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let vocabulary = GgufVocabulary::read(file)?;
        let pipeline = match file.get_text("tokenizer.ggml.model")? {
            Some("gpt2") => vocabulary.byte_level()?,
            Some("llama") => vocabulary.sentence_piece()?,
            model => {
                return Err(file.error(format!("tokenizer.ggml.model is {model:?}, but must be \"gpt2\" or \"llama\"")))
            }
        };
        let (bos, eos) = (vocabulary.id("bos")?, vocabulary.id("eos")?);
        let mut tokenizer = Self::from_pipeline(pipeline, bos, eos)?;
        tokenizer.set_named_tokens(vocabulary.named_tokens(bos, eos)?);
        let add = |key: &str, default: bool, id: Option<u32>| -> Result<Vec<u32>> {
            let add = file.get_bool(key)?.unwrap_or(default);
            Ok(id.filter(|_| add).into_iter().collect())
        };
        let prefix = add("tokenizer.ggml.add_bos_token", vocabulary.adds_bos()?, bos)?;
        let suffix = add("tokenizer.ggml.add_eos_token", false, eos)?;
        tokenizer.set_surrounding_tokens(prefix, suffix);
        Ok(tokenizer)
    }
}

struct GgufVocabulary<'a> {
    file: &'a GgufFile,
    tokens: Vec<&'a str>,
    types: Vec<i64>,
}

impl<'a> GgufVocabulary<'a> {
    fn read(file: &'a GgufFile) -> Result<Self> {
        let key = "tokenizer.ggml.tokens";
        let tokens = file.get_array(key, &[Kind::Text])?.ok_or_else(|| file.error(format!("{key} is missing")))?;
        let tokens: Vec<&str> = file.texts(tokens).collect();
        let types = match file.get_array("tokenizer.ggml.token_type", &[Kind::I32, Kind::U32])? {
            None => vec![NORMAL; tokens.len()],
            Some(types) => file
                .scalars(types)
                .map(|value| match value {
                    Value::Signed(kind) => kind,
                    Value::Unsigned(kind) => kind as i64,
                    _ => unreachable!("the array holds integers"),
                })
                .collect(),
        };
        let vocabulary = Self { file, tokens, types };
        vocabulary.check_len("tokenizer.ggml.token_type", vocabulary.types.len())?;
        Ok(vocabulary)
    }

    fn check_len(&self, key: &str, len: usize) -> Result<()> {
        if len == self.tokens.len() {
            return Ok(());
        }
        let tokens = self.tokens.len();
        Err(self.file.error(format!("{key} has {len} values, but tokenizer.ggml.tokens has {tokens}")))
    }

    /// The id under `tokenizer.ggml.{name}_token_id`.
    fn id(&self, name: &str) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = self.file.get_u32(&key)? else { return Ok(None) };
        if id as usize >= self.tokens.len() {
            let limit = self.tokens.len();
            return Err(self.file.error(format!("{key} is {id}, but the vocabulary has {limit} tokens")));
        }
        Ok(Some(id))
    }

    /// What templates know. BOS and EOS are empty text where there are none, as in llama.cpp; of the
    /// others, which nothing else needs, an id that the vocabulary does not have is none.
    fn named_tokens(&self, bos: Option<u32>, eos: Option<u32>) -> Result<BTreeMap<String, String>> {
        let text = |id: u32| self.tokens.get(id as usize).map(|token| (*token).to_owned());
        let mut named = BTreeMap::new();
        for (name, id) in [("bos_token", bos), ("eos_token", eos)] {
            named.insert(name.to_owned(), id.and_then(text).unwrap_or_default());
        }
        for (name, key) in OTHER_NAMED {
            let id = self.file.get_u32(&format!("tokenizer.ggml.{key}_token_id"))?;
            named.extend(id.and_then(text).map(|token| (name.to_owned(), token)));
        }
        Ok(named)
    }

    /// Whether BOS begins every text where the file does not say.
    fn adds_bos(&self) -> Result<bool> {
        let is_sentence_piece = self.file.get_text("tokenizer.ggml.model")? == Some("llama");
        Ok(is_sentence_piece || self.pre_tokenizer()? == Some(PreTokenizer::LlamaBpe))
    }

    fn pre_tokenizer(&self) -> Result<Option<PreTokenizer>> {
        Ok(match self.file.get_text("tokenizer.ggml.pre")? {
            Some("smollm") => Some(PreTokenizer::SmolLm),
            Some("gpt-2") => Some(PreTokenizer::Gpt2),
            Some("llama-bpe" | "llama3" | "llama-v3") => Some(PreTokenizer::LlamaBpe),
            Some("qwen2" | "deepseek-r1-qwen") => Some(PreTokenizer::Qwen2),
            _ => None,
        })
    }

    /// Byte-level BPE.
    fn byte_level(&self) -> Result<tokenizers::Tokenizer> {
        let pre_tokenizer = self.pre_tokenizer()?.ok_or_else(|| {
            self.file.error(format!(
                "tokenizer.ggml.pre is {:?}, but supported are \"smollm\", \"gpt-2\", \"llama-bpe\" and \"qwen2\"",
                self.file.get_text("tokenizer.ggml.pre").ok().flatten()
            ))
        })?;
        let key = "tokenizer.ggml.merges";
        let merges = self.file.get_array(key, &[Kind::Text])?;
        let merges = merges.ok_or_else(|| self.file.error(format!("{key} is missing")))?;
        let merges = self
            .file
            .texts(merges)
            .map(|merge| {
                let pair = merge.split_once(' ').filter(|(left, right)| !left.is_empty() && !right.is_empty());
                let (left, right) = pair.ok_or_else(|| {
                    self.file
                        .error(format!("{key} holds {merge:?}, but must hold pairs of tokens with a space between"))
                })?;
                Ok((left.to_owned(), right.to_owned()))
            })
            .collect::<Result<Vec<_>>>()?;
        let model = BPE::builder()
            .vocab_and_merges(self.vocab()?, merges)
            .ignore_merges(pre_tokenizer == PreTokenizer::LlamaBpe)
            .build()
            .map_err(|error| self.file.error(format!("{key}: {error}")))?;
        let mut pipeline = tokenizers::Tokenizer::new(model);
        if pre_tokenizer == PreTokenizer::Qwen2 {
            self.add_normalizer(&mut pipeline, json!({"type": "NFC"}))?;
        }
        pipeline.with_pre_tokenizer(Some(from_json::<PreTokenizerWrapper>(pre_tokenizer.to_json())));
        let decoder = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        pipeline.with_decoder(Some(from_json::<DecoderWrapper>(decoder)));
        self.add_tokens(&mut pipeline)?;
        Ok(pipeline)
    }

    /// SentencePiece BPE with byte fallback.
    fn sentence_piece(&self) -> Result<tokenizers::Tokenizer> {
        let vocab = self.vocab()?;
        let merges = self.merges_by_score(&vocab)?;
        let mut builder = BPE::builder().vocab_and_merges(vocab, merges).fuse_unk(true).byte_fallback(true);
        if let Some(unknown) = self.id("unknown")? {
            builder = builder.unk_token(self.tokens[unknown as usize].to_owned());
        }
        let model = builder.build().map_err(|error| self.file.error(format!("tokenizer.ggml.tokens: {error}")))?;
        let mut pipeline = tokenizers::Tokenizer::new(model);

        let space_prefix = self.file.get_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if space_prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        self.add_normalizer(&mut pipeline, json!({"type": "Sequence", "normalizers": normalizers}))?;
        pipeline.with_decoder(Some(from_json::<DecoderWrapper>(json!({"type": "Sequence", "decoders": decoders}))));
        self.add_tokens(&mut pipeline)?;
        Ok(pipeline)
    }

    /// Every pair of tokens that makes a third one, best score first: the order in which
    /// SentencePiece merges.
    ///
    /// Pieces of equal score, and the ways to make one piece, are ordered as `transformers` does
    /// when it converts a SentencePiece model. Control tokens are never made: text cannot spell
    /// them.
    fn merges_by_score(&self, vocab: &Vocab) -> Result<Vec<(String, String)>> {
        let key = "tokenizer.ggml.scores";
        let scores = self.file.get_array(key, &[Kind::F32])?;
        let scores = scores.ok_or_else(|| self.file.error(format!("{key} is missing")))?;
        self.check_len(key, scores.len)?;
        // (score, characters of the left part, of the right part, left, right)
        let mut merges: Vec<(f64, usize, usize, &str, &str)> = Vec::new();
        for (id, score) in self.file.scalars(scores).enumerate() {
            let Value::Float(score) = score else { unreachable!("the array holds floats") };
            if score.is_nan() {
                return Err(self.file.error(format!("{key}: score of token {id} is NaN")));
            }
            if !matches!(self.types[id], NORMAL | USER_DEFINED) {
                continue;
            }
            let token = self.tokens[id];
            let num_chars = token.chars().count();
            if num_chars > MAX_PIECE_CHARS {
                return Err(self.file.error(format!(
                    "tokenizer.ggml.tokens: token {id} has {num_chars} characters, but must have at most {MAX_PIECE_CHARS}"
                )));
            }
            let first = merges.len();
            for (left_chars, (at, _)) in token.char_indices().enumerate().skip(1) {
                let (left, right) = token.split_at(at);
                if vocab.contains_key(left) && vocab.contains_key(right) {
                    merges.push((score, left_chars, num_chars - left_chars, left, right));
                }
            }
            merges[first..].sort_by_key(|&(.., left, right)| (vocab[left], vocab[right]));
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (b.1, b.2).cmp(&(a.1, a.2))));
        Ok(merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect())
    }

    fn vocab(&self) -> Result<Vocab> {
        let mut vocab = Vocab::default();
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(first) = vocab.insert((*token).to_owned(), id as u32) {
                return Err(self
                    .file
                    .error(format!("tokenizer.ggml.tokens: tokens {first} and {id} are both {token:?}")));
            }
        }
        Ok(vocab)
    }

    /// Control and unknown tokens are special; user-defined ones are found in any text, but are
    /// ordinary text.
    fn add_tokens(&self, pipeline: &mut tokenizers::Tokenizer) -> Result<()> {
        let of_types = |kinds: &[i64], special| {
            let pairs = self.tokens.iter().zip(&self.types).filter(|(_, kind)| kinds.contains(kind));
            pairs.map(|(token, _)| AddedToken::from(*token, special).normalized(false)).collect::<Vec<_>>()
        };
        let (special, ordinary) = (of_types(&[CONTROL, UNKNOWN], true), of_types(&[USER_DEFINED], false));
        let texts = special.iter().chain(&ordinary).map(|token| token.content.as_str());
        check_size(texts).map_err(|problem| self.file.error(format!("tokenizer.ggml.tokens: {problem}")))?;
        pipeline
            .add_special_tokens(special)
            .and_then(|_| pipeline.add_tokens(ordinary))
            .map_err(|error| self.file.error(format!("tokenizer.ggml.tokens: {error}")))?;
        Ok(())
    }

    fn add_normalizer(&self, pipeline: &mut tokenizers::Tokenizer, normalizer: serde_json::Value) -> Result<()> {
        pipeline
            .with_normalizer(Some(from_json::<NormalizerWrapper>(normalizer)))
            .map(|_| ())
            .map_err(|error| self.file.error(format!("tokenizer.ggml: {error}")))
    }
}

/// How byte-level BPE cuts text into words before merging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PreTokenizer {
    SmolLm,
    Gpt2,
    LlamaBpe,
    Qwen2,
}

impl PreTokenizer {
    fn to_json(self) -> serde_json::Value {
        let byte_level = |use_regex| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let split = |digits| {
            let regex = format!("{WORDS_BEFORE_DIGITS}{digits}{WORDS_AFTER_DIGITS}");
            json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false})
        };
        let steps = match self {
            Self::Gpt2 => vec![byte_level(true)],
            Self::SmolLm => vec![json!({"type": "Digits", "individual_digits": true}), byte_level(true)],
            Self::LlamaBpe => vec![split(r"\p{N}{1,3}"), byte_level(false)],
            Self::Qwen2 => vec![split(r"\p{N}"), byte_level(false)],
        };
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

/// A component of the `tokenizers` crate from the form it has in `tokenizer.json`.
fn from_json<T: serde::de::DeserializeOwned>(component: serde_json::Value) -> T {
    serde_json::from_value(component).expect("written above in the crate's own form")
}
