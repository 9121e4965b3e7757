//! Added and special tokens that are written beside `tokenizer.json`: in `tokenizer_config.json`,
//! and for files of older times in `special_tokens_map.json` and `added_tokens.json`.
//!
//! The rules are those of transformers 5 (`PreTrainedTokenizerBase._from_pretrained` and
//! `TokenizersBackend.__init__`): the two older files count only where `tokenizer_config.json` has
//! no `added_tokens_decoder`, and what is in no file's list of added tokens yet is added as a
//! special token.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::error::{Error, Result};

const CONFIG: &str = "tokenizer_config.json";
const SPECIAL_MAP: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";
const EXTRA: &str = "extra_special_tokens";
/// What `EXTRA` was called before transformers 5.
const ADDITIONAL: &str = "additional_special_tokens";
/// Names that every tokenizer knows, in the order in which they are added.
const STANDARD: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Adds to `pipeline` what the files in `folder` add. Returns the special tokens that have names
/// (`bos_token`, `pad_token`, `image_token`, ...), which templates know them by.
///
/// # Errors
/// [`Error::Tokenizer`] names the file and the key at fault.
pub(crate) fn add_from_folder(pipeline: &mut tokenizers::Tokenizer, folder: &Path) -> Result<BTreeMap<String, String>> {
    let config = File::read(folder, CONFIG)?;
    let mut given = Names::of_config(&config)?;
    let in_pipeline: BTreeMap<u32, AddedToken> = pipeline.get_added_tokens_decoder().into_iter().collect();
    let mut by_id = BTreeMap::new();
    if let Some(decoder) = config.get("added_tokens_decoder") {
        for (id, token) in config.object("added_tokens_decoder", decoder)? {
            let key = format!("added_tokens_decoder.{id}");
            let id = id.parse::<u32>().map_err(|_| config.error(&key, &Value::from(id.as_str()), "a token id"))?;
            by_id.insert(id, config.token_object(&key, token, false)?);
        }
    } else {
        given.merge_special_map(&File::read(folder, SPECIAL_MAP)?)?;
        let added = File::read(folder, ADDED)?;
        for (text, id) in &added.values {
            let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let number = number.ok_or_else(|| added.error(text, id, "a token id"))?;
            by_id.insert(number, AddedToken::from(text.as_str(), given.is_special(text)));
        }
        by_id.extend(in_pipeline.iter().map(|(id, token)| (*id, token.clone())));
    }
    if let Some(padding) = pipeline.get_padding().filter(|_| !config.values.contains_key("pad_token")) {
        given.standard[4].get_or_insert_with(|| AddedToken::from(padding.pad_token.as_str(), true));
    }
    for named in given.standard.iter_mut().flatten() {
        if let Some(token) = by_id.values().find(|token| token.content == named.content) {
            *named = token.clone();
        }
    }

    let named = given.all_named();
    let named_texts = named.iter().map(|(_, token)| token.content.as_str());
    let special_texts = in_pipeline.values().filter(|token| token.special).map(|token| token.content.as_str());
    let special: HashSet<&str> = special_texts.chain(named_texts).collect();
    let known: HashSet<&str> = in_pipeline.values().chain(by_id.values()).map(|token| token.content.as_str()).collect();
    let missing = named.iter().map(|(_, token)| token).chain(&given.extra);
    let missing = missing.filter(|token| !known.contains(token.content.as_str()));
    let to_add: Vec<AddedToken> = by_id
        .values()
        .chain(missing)
        .map(|token| AddedToken { special: token.special || special.contains(token.content.as_str()), ..token.clone() })
        .collect();
    check_size(to_add.iter().map(|token| token.content.as_str()))
        .map_err(|problem| Error::Tokenizer(format!("{}: {problem}", folder.display())))?;
    pipeline.add_tokens(to_add).map_err(|error| Error::Tokenizer(format!("{}: {error}", folder.display())))?;
    Ok(named.iter().map(|(name, token)| (name.clone(), token.content.clone())).collect())
}

/// Bytes of all added tokens of a vocabulary: the library takes more than a second for each million,
/// and published ones have a tenth of that.
const MAX_ADDED: usize = 1 << 20;

/// Refuses added tokens that are too long, all together.
///
/// # Errors
/// What is wrong, in words.
pub(crate) fn check_size<'a>(tokens: impl Iterator<Item = &'a str>) -> std::result::Result<(), String> {
    let len: usize = tokens.map(str::len).sum();
    if len > MAX_ADDED {
        return Err(format!("the added tokens have {len} bytes, at most {MAX_ADDED} are allowed"));
    }
    Ok(())
}

/// The same of the `tokenizer.json` at `path`, before the library reads it. What is no such file is
/// the library's to say.
pub(crate) fn check_size_of_file(path: &Path) -> Result<()> {
    #[derive(serde::Deserialize)]
    struct Token {
        content: String,
    }
    #[derive(serde::Deserialize)]
    struct Head {
        #[serde(default)]
        added_tokens: Vec<Token>,
    }
    let Ok(head) = fs::read(path).map_err(drop).and_then(|text| serde_json::from_slice::<Head>(&text).map_err(drop))
    else {
        return Ok(());
    };
    check_size(head.added_tokens.iter().map(|token| token.content.as_str()))
        .map_err(|problem| Error::Tokenizer(format!("{}: {problem}", path.display())))
}

/// What the files say of special tokens.
#[derive(Debug, Default)]
struct Names {
    standard: [Option<AddedToken>; STANDARD.len()],
    /// Names of the model's own, given with flags or in the older file: these are added first.
    early: Vec<(String, AddedToken)>,
    /// The others of the model's own; of two with one name these count.
    own: Vec<(String, AddedToken)>,
    extra: Vec<AddedToken>,
    /// The configuration has a list of extra tokens, if an empty one.
    lists_extra: bool,
}

impl Names {
    fn of_config(config: &File) -> Result<Self> {
        let mut names = Self::default();
        for (slot, name) in names.standard.iter_mut().zip(STANDARD) {
            *slot = config.get(name).map(|value| config.token(name, value, false)).transpose()?;
        }
        for (name, value) in &config.values {
            if name.ends_with("_token") && !STANDARD.contains(&name.as_str()) {
                if value.is_string() {
                    names.own.push((name.clone(), config.token(name, value, false)?));
                } else if value["__type"] == "AddedToken" {
                    names.early.push((name.clone(), config.token(name, value, false)?));
                }
            }
        }
        let list = |name: &str| config.get(name).filter(|value| !value.is_object());
        if let Some(named) = config.get(EXTRA).and_then(Value::as_object) {
            for (name, value) in named {
                set(&mut names.own, name, config.token(&format!("{EXTRA}.{name}"), value, false)?);
            }
        }
        names.lists_extra = list(EXTRA).or(list(ADDITIONAL)).is_some();
        for key in [EXTRA, ADDITIONAL] {
            if let Some(value) = list(key).filter(|_| names.extra.is_empty()) {
                names.extra = config.tokens(key, value, false)?;
            }
        }
        Ok(names)
    }

    fn merge_special_map(&mut self, map: &File) -> Result<()> {
        for (name, value) in &map.values {
            if let Some(index) = STANDARD.iter().position(|standard| standard == name) {
                self.standard[index] = if value.is_null() { None } else { Some(map.token(name, value, true)?) };
            } else if name == EXTRA {
                if let Some(named) = value.as_object() {
                    for (name, value) in named {
                        set(&mut self.own, name, map.token(&format!("{EXTRA}.{name}"), value, true)?);
                    }
                } else if !value.is_null() {
                    self.extra.extend(map.tokens(name, value, true)?);
                }
            } else if name == ADDITIONAL {
                if !self.lists_extra && !value.is_null() {
                    self.extra.extend(map.tokens(name, value, true)?);
                }
            } else if name.ends_with("_token") && (value.is_string() || value.is_object()) {
                set(&mut self.early, name, map.token(name, value, true)?);
            }
        }
        Ok(())
    }

    /// Whether a token of `added_tokens.json` is special.
    fn is_special(&self, text: &str) -> bool {
        self.standard.iter().flatten().chain(&self.extra).any(|token| token.content == text)
    }

    fn all_named(&self) -> Vec<(String, AddedToken)> {
        let standard = STANDARD.iter().zip(&self.standard);
        let standard = standard.filter_map(|(name, token)| Some(((*name).to_owned(), token.clone()?)));
        let mut all: Vec<(String, AddedToken)> = standard.chain(self.early.iter().cloned()).collect();
        for (name, token) in &self.own {
            set(&mut all, name, token.clone());
        }
        all
    }
}

/// Gives a name its token, in the place of the one that it had.
fn set(tokens: &mut Vec<(String, AddedToken)>, name: &str, token: AddedToken) {
    match tokens.iter_mut().find(|(known, _)| known == name) {
        Some((_, known)) => *known = token,
        None => tokens.push((name.to_owned(), token)),
    }
}

/// The object in a file; a file that is missing has no keys.
struct File {
    path: String,
    values: Map<String, Value>,
}

impl File {
    fn read(folder: &Path, name: &str) -> Result<Self> {
        let path = folder.join(name);
        let error = |what: String| Error::Tokenizer(format!("{}: {what}", path.display()));
        let values = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|what| error(what.to_string()))?,
            Err(what) if what.kind() == ErrorKind::NotFound => Map::new(),
            Err(what) => return Err(error(what.to_string())),
        };
        Ok(Self { path: path.display().to_string(), values })
    }

    /// A value that is there and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    fn error(&self, key: &str, value: &Value, wanted: &str) -> Error {
        let mut value = value.to_string();
        if let Some((cut, _)) = value.char_indices().nth(100) {
            value.truncate(cut);
            value.push_str("...");
        }
        Error::Tokenizer(format!("{}: {key} is {value}, but must be {wanted}", self.path))
    }

    fn object<'a>(&self, key: &str, value: &'a Value) -> Result<&'a Map<String, Value>> {
        value.as_object().ok_or_else(|| self.error(key, value, "an object"))
    }

    /// Text, which is a special token, or an object with `content`. special: so is that, whatever
    /// it says.
    fn token(&self, key: &str, value: &Value, special: bool) -> Result<AddedToken> {
        match value.as_str() {
            Some(text) => Ok(AddedToken::from(text, true)),
            None => self.token_object(key, value, special),
        }
    }

    fn tokens(&self, key: &str, value: &Value, special: bool) -> Result<Vec<AddedToken>> {
        let list = value.as_array().ok_or_else(|| self.error(key, value, "a list of tokens"))?;
        (0..).zip(list).map(|(index, token)| self.token(&format!("{key}[{index}]"), token, special)).collect()
    }

    /// special: it is special, whatever it says.
    fn token_object(&self, key: &str, value: &Value, special: bool) -> Result<AddedToken> {
        let wanted = "a string or an object with a string `content` and true or false for the rest";
        let text = value["content"].as_str().ok_or_else(|| self.error(key, value, wanted))?;
        let flag = |name: &str| match &value[name] {
            Value::Null => Ok(None),
            Value::Bool(flag) => Ok(Some(*flag)),
            _ => Err(self.error(key, value, wanted)),
        };
        let special = flag("special")?.unwrap_or(false) || special;
        let token = AddedToken::from(text, special)
            .single_word(flag("single_word")?.unwrap_or(false))
            .lstrip(flag("lstrip")?.unwrap_or(false))
            .rstrip(flag("rstrip")?.unwrap_or(false));
        Ok(match flag("normalized")? {
            Some(normalized) => token.normalized(normalized),
            None => token,
        })
    }
}
