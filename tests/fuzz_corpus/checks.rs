//! What must hold for any bytes: `fuzz/` looks for bytes that break it, `main.rs` replays those
//! that once were new.
//!
//! A panic, a hang and an allocation out of proportion are findings; an error is an answer.

use std::path::Path;

use _core::gguf::{GgufFile, Kind, Value};
use _core::text::{ChatTemplate, RenderOptions, Specials, Tokenizer};

/// Text that a render can make with its fuel: 64 bytes a unit, and one unit a byte of input beyond
/// the first million.
const MAX_RENDERED_BYTES: usize = 64 << 20;
const MESSAGES: &str = r#"[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi, <b>you</b>\n"},
    {"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f","arguments":{"x":[1,2.5,true]}}}]}]"#;
const TOOLS: &str = r#"[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}]"#;

/// A GGUF file is refused, or all it names lies inside it and can be read; the same goes for a
/// vocabulary in it.
pub fn gguf(bytes: &[u8]) {
    let Ok(file) = GgufFile::parse(Path::new("fuzzed.gguf"), bytes) else { return };
    for tensor in file.tensors() {
        assert_eq!(file.tensor_bytes(tensor).len() as u64, tensor.num_bytes);
    }
    for (_, value) in file.metadata() {
        match value {
            Value::Text(range) => assert_eq!(file.text(range).len(), range.len()),
            Value::Array(array) if array.kind == Kind::Text => assert_eq!(file.texts(array).count(), array.len),
            Value::Array(array) => assert_eq!(file.scalars(array).count(), array.len),
            _ => {}
        }
    }
    let _ = file.check_types();
    if let Ok(tokenizer) = Tokenizer::from_gguf(&file) {
        if let Ok(ids) = tokenizer.encode_text("Hello, wörld 42!\n <s>", true, Specials::Parse) {
            let _ = tokenizer.decode(&ids, true);
        }
    }
}

/// A template is refused, or its render ends within its fuel. bytes: the source, and after a zero
/// byte the messages.
pub fn template(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (source, messages) = text.split_once('\0').unwrap_or((text, MESSAGES));
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, token)| (name.to_owned(), token.to_owned()));
    let Ok(template) = ChatTemplate::new(Some(source), None, tokens.into()) else { return };
    let options = RenderOptions {
        tools_json: Some(TOOLS.as_bytes()),
        add_generation_prompt: true,
        kwargs_json: Some(br#"{"enable_thinking":false}"#),
        now: 1.7e9,
        ..RenderOptions::default()
    };
    if let Ok(rendered) = template.render(messages.as_bytes(), &options) {
        assert!(rendered.len() <= MAX_RENDERED_BYTES + 64 * messages.len(), "made {} bytes", rendered.len());
    }
}
