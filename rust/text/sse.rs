//! Server-sent events of OpenAI's streams, built without a JSON object per token.
//!
//! Everything that is the same in each frame of a request is built once; a delta is then: constant head, choice index,
//! escaped text, constant tail. Frames are exactly `data: `, one line of JSON, and an empty line.
//!
//! One frame a token, also when its text is empty (benchmark clients count frames); the role comes with the first
//! content, so that the first frame marks the first token; with `include_usage` every frame has `"usage":null` and one
//! more frame with empty `choices` carries the usage.

use std::io::Write;

/// Which of OpenAI's two streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// `/v1/completions`: `text_completion` objects with `text`.
    Completion,
    /// `/v1/chat/completions`: `chat.completion.chunk` objects with `delta`.
    Chat,
}

/// Token counts of a request so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens put out, over all choices.
    pub completion_tokens: usize,
    /// Prompt tokens found in the prefix cache; `None` leaves the field out.
    pub cached_tokens: Option<usize>,
}

/// What made a choice stop, where it was not the end of the model's turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason<'a> {
    /// This stop string.
    Text(&'a str),
    /// This stop token id.
    Token(u32),
}

/// One frame's content.
#[derive(Debug, Clone, Copy, Default)]
pub struct Delta<'a> {
    /// The choice it belongs to.
    pub index: u32,
    /// New text; may be empty.
    pub text: &'a str,
    /// The choice's first frame: a chat's role comes with it.
    pub first: bool,
    /// The JSON object of the new tokens' logprobs.
    pub logprobs: Option<&'a str>,
    /// Why the choice ended, in its last frame.
    pub finish_reason: Option<&'a str>,
    /// What ended it.
    pub stop_reason: Option<StopReason<'a>>,
    /// Written into the frame when the client asked for usage in every frame.
    pub usage: Option<Usage>,
}

/// The constant text around each delta of one request.
#[derive(Debug, Clone)]
pub struct FrameTemplate {
    kind: FrameKind,
    /// `data: {...,"choices":[`
    head: Box<[u8]>,
    include_usage: bool,
    continuous_usage: bool,
}

impl FrameTemplate {
    /// The frames of one request. `created` is in seconds since 1970.
    pub fn new(
        kind: FrameKind,
        id: &str,
        model: &str,
        created: u64,
        include_usage: bool,
        continuous_usage: bool,
    ) -> Self {
        let object = match kind {
            FrameKind::Completion => "text_completion",
            FrameKind::Chat => "chat.completion.chunk",
        };
        let mut head = Vec::with_capacity(128 + id.len() + model.len());
        head.extend_from_slice(b"data: {\"id\":");
        write_json_string(&mut head, id);
        head.extend_from_slice(b",\"object\":\"");
        head.extend_from_slice(object.as_bytes());
        head.extend_from_slice(b"\",\"created\":");
        write_number(&mut head, created);
        head.extend_from_slice(b",\"model\":");
        write_json_string(&mut head, model);
        head.extend_from_slice(b",\"choices\":[");
        Self { kind, head: head.into(), include_usage, continuous_usage }
    }

    /// Which stream the frames belong to.
    pub fn kind(&self) -> FrameKind {
        self.kind
    }

    /// The client asked for a usage frame at the end: see [`Self::write_usage`].
    pub fn include_usage(&self) -> bool {
        self.include_usage
    }

    /// The client asked for usage in every frame.
    pub fn continuous_usage(&self) -> bool {
        self.continuous_usage
    }

    /// Appends one content frame.
    pub fn write_delta(&self, out: &mut Vec<u8>, delta: &Delta) {
        out.extend_from_slice(&self.head);
        out.extend_from_slice(b"{\"index\":");
        write_number(out, u64::from(delta.index));
        match (self.kind, delta.first) {
            (FrameKind::Completion, _) => out.extend_from_slice(b",\"text\":\""),
            (FrameKind::Chat, true) => out.extend_from_slice(b",\"delta\":{\"role\":\"assistant\",\"content\":\""),
            (FrameKind::Chat, false) => out.extend_from_slice(b",\"delta\":{\"content\":\""),
        }
        write_escaped(out, delta.text);
        out.extend_from_slice(match self.kind {
            FrameKind::Completion => b"\"",
            FrameKind::Chat => b"\"}",
        });
        match (delta.logprobs, delta.finish_reason) {
            (None, None) => out.extend_from_slice(b",\"logprobs\":null,\"finish_reason\":null"),
            (logprobs, finish_reason) => {
                out.extend_from_slice(b",\"logprobs\":");
                out.extend_from_slice(logprobs.unwrap_or("null").as_bytes());
                out.extend_from_slice(b",\"finish_reason\":");
                match finish_reason {
                    Some(reason) => write_json_string(out, reason),
                    None => out.extend_from_slice(b"null"),
                }
            }
        }
        match delta.stop_reason {
            None => {}
            Some(StopReason::Text(text)) => {
                out.extend_from_slice(b",\"stop_reason\":");
                write_json_string(out, text);
            }
            Some(StopReason::Token(token)) => {
                out.extend_from_slice(b",\"stop_reason\":");
                write_number(out, u64::from(token));
            }
        }
        out.extend_from_slice(b"}]");
        match delta.usage.filter(|_| self.continuous_usage) {
            Some(usage) => {
                out.push(b',');
                usage.write(out);
            }
            None if self.include_usage => out.extend_from_slice(b",\"usage\":null"),
            None => {}
        }
        out.extend_from_slice(b"}\n\n");
    }

    /// Appends the frame with empty `choices` that carries the usage of the whole request.
    pub fn write_usage(&self, out: &mut Vec<u8>, usage: Usage) {
        out.extend_from_slice(&self.head);
        out.extend_from_slice(b"],");
        usage.write(out);
        out.extend_from_slice(b"}\n\n");
    }

    /// Appends the frame that ends every stream.
    pub fn write_done(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// Appends an error frame in the shape clients raise on: the HTTP status is long sent.
    pub fn write_error(&self, out: &mut Vec<u8>, message: &str, kind: &str, code: Option<&str>) {
        out.extend_from_slice(b"data: {\"error\":{\"message\":");
        write_json_string(out, message);
        out.extend_from_slice(b",\"type\":");
        write_json_string(out, kind);
        out.extend_from_slice(b",\"param\":null,\"code\":");
        match code {
            Some(code) => write_json_string(out, code),
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b"}}\n\n");
    }
}

impl Usage {
    /// Appends `"usage":{...}`.
    fn write(self, out: &mut Vec<u8>) {
        let Self { prompt_tokens, completion_tokens, cached_tokens } = self;
        let total = prompt_tokens + completion_tokens;
        write!(
            out,
            "\"usage\":{{\"prompt_tokens\":{prompt_tokens},\"completion_tokens\":{completion_tokens},\"total_tokens\":{total}"
        )
        .expect("writing to a Vec cannot fail");
        if let Some(cached) = cached_tokens {
            write!(out, ",\"prompt_tokens_details\":{{\"cached_tokens\":{cached}}}")
                .expect("writing to a Vec cannot fail");
        }
        out.push(b'}');
    }
}

/// Appends `text` as a JSON string with its quotes.
pub fn write_json_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    write_escaped(out, text);
    out.push(b'"');
}

/// Appends `text` as the inside of a JSON string.
///
/// Besides what JSON demands, U+0085, U+2028 and U+2029 are escaped: some clients split a stream's lines as Python's
/// `str.splitlines` does.
pub fn write_escaped(out: &mut Vec<u8>, text: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let bytes = text.as_bytes();
    let mut start = 0;
    let mut at = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        let length = match (byte, &bytes[at + 1..]) {
            (b'"' | b'\\' | ..0x20, _) => 1,
            (0xC2, [0x85, ..]) => 2,
            (0xE2, [0x80, 0xA8 | 0xA9, ..]) => 3,
            _ => {
                at += 1;
                continue;
            }
        };
        out.extend_from_slice(&bytes[start..at]);
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0xC2 => out.extend_from_slice(b"\\u0085"),
            0xE2 if bytes[at + 2] == 0xA8 => out.extend_from_slice(b"\\u2028"),
            0xE2 => out.extend_from_slice(b"\\u2029"),
            control => {
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&[HEX[usize::from(control >> 4)], HEX[usize::from(control & 15)]]);
            }
        }
        at += length;
        start = at;
    }
    out.extend_from_slice(&bytes[start..]);
}

fn write_number(out: &mut Vec<u8>, number: u64) {
    write!(out, "{number}").expect("writing to a Vec cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn escaped_text_is_one_line_of_json(text in any::<String>()) {
            let mut out = Vec::new();
            write_json_string(&mut out, &text);
            let line_breaks = ['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}'];
            prop_assert!(!String::from_utf8_lossy(&out).contains(line_breaks));
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
        }
    }
    fn frames(kind: FrameKind) -> FrameTemplate {
        FrameTemplate::new(kind, "id-1", "a \"model\"", 17, true, false)
    }

    /// The one JSON object of a frame.
    fn json(frame: &[u8]) -> serde_json::Value {
        let line = frame.strip_prefix(b"data: ").unwrap().strip_suffix(b"\n\n").unwrap();
        assert!(!line.contains(&b'\n'));
        serde_json::from_slice(line).unwrap()
    }

    fn frame(template: &FrameTemplate, delta: &Delta) -> serde_json::Value {
        let mut out = Vec::new();
        template.write_delta(&mut out, delta);
        json(&out)
    }

    #[test]
    fn chat_frames_carry_the_role_with_the_first_text() {
        let template = frames(FrameKind::Chat);
        let first = frame(&template, &Delta { index: 1, text: "H\n", first: true, ..Delta::default() });
        assert_eq!(
            first,
            serde_json::json!({
                "id": "id-1", "object": "chat.completion.chunk", "created": 17, "model": "a \"model\"",
                "choices": [{"index": 1, "delta": {"role": "assistant", "content": "H\n"}, "logprobs": null,
                    "finish_reason": null}],
                "usage": null,
            })
        );
        let last = Delta {
            logprobs: Some("{\"content\":[]}"),
            finish_reason: Some("stop"),
            stop_reason: Some(StopReason::Text("\"")),
            ..Delta::default()
        };
        assert_eq!(
            frame(&template, &last)["choices"],
            serde_json::json!([{"index": 0, "delta": {"content": ""}, "logprobs": {"content": []},
                "finish_reason": "stop", "stop_reason": "\""}])
        );
    }

    #[test]
    fn completion_frames_hold_text() {
        let last = Delta {
            text: "é",
            finish_reason: Some("stop"),
            stop_reason: Some(StopReason::Token(7)),
            ..Delta::default()
        };
        let object = frame(&frames(FrameKind::Completion), &last);
        assert_eq!(object["object"], "text_completion");
        assert_eq!(
            object["choices"],
            serde_json::json!([{"index": 0, "text": "é", "logprobs": null, "finish_reason": "stop", "stop_reason": 7}])
        );
    }

    #[test]
    fn usage_comes_where_it_was_asked_for() {
        let usage = Usage { prompt_tokens: 3, completion_tokens: 4, cached_tokens: Some(2) };
        let expected = serde_json::json!({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 2}});
        let delta = Delta { usage: Some(usage), ..Delta::default() };
        assert!(frame(&frames(FrameKind::Chat), &delta)["usage"].is_null());
        let none = FrameTemplate::new(FrameKind::Chat, "", "", 0, false, false);
        assert!(frame(&none, &delta).get("usage").is_none());
        let continuous = FrameTemplate::new(FrameKind::Chat, "", "", 0, false, true);
        assert_eq!(frame(&continuous, &delta)["usage"], expected);

        let mut out = Vec::new();
        frames(FrameKind::Chat).write_usage(&mut out, usage);
        let object = json(&out);
        assert_eq!((&object["choices"], &object["usage"]), (&serde_json::json!([]), &expected));
    }

    #[test]
    fn streams_end_with_done_also_after_an_error() {
        let mut out = Vec::new();
        frames(FrameKind::Chat).write_error(&mut out, "it \"broke\"", "server_error", None);
        assert_eq!(
            json(&out),
            serde_json::json!({"error": {"message": "it \"broke\"", "type": "server_error", "param": null, "code": null}})
        );
        out.clear();
        frames(FrameKind::Chat).write_done(&mut out);
        assert_eq!(out, b"data: [DONE]\n\n");
    }
}
