//! Chat templates: Jinja under fuel, with what Hugging Face adds to it.
//!
//! The environment is the one of `transformers`' `_compile_jinja_template`: `trim_blocks`,
//! `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now`, `tojson` as `json.dumps`, and
//! Python's string methods. A template comes with a model file and is not trusted: fuel bounds its
//! work, the recursion limit its stack, and nothing outside the messages can be reached from it.
//! Where minijinja asks for no fuel, `template_source.rs` sees to it.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::text::answer::{CallFormat, ReasoningTags};
use crate::text::clock::strftime;
use crate::text::json::Json;
use crate::text::rendered_text::RenderedText;
use crate::text::template_source::{rewrite, BOUND_FILTER, ITER_FILTER, PERCENT_FILTER};
use crate::text::{python_methods, python_values, template_limits};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, State, UndefinedBehavior, Value};

/// Longest source, in bytes; the longest known templates have about 20,000.
const MAX_SOURCE_BYTES: usize = 1 << 18;
/// Work units (about one an instruction and one per 64 bytes made) of a render, and more for each
/// message.
const FUEL: u64 = 1_000_000;
const FUEL_PER_MESSAGE: u64 = 1_000;
/// Fuel for large messages: what is said may be copied a few times.
const FUEL_PER_INPUT_BYTE: u64 = 1;
/// A macro inside a macro counts for 4.
const RECURSION_LIMIT: usize = 200;
/// Names of variables that only Octavo sets.
const RESERVED: [&str; 5] = ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token"];
const NAME: &str = "chat_template";

/// A model's compiled chat templates: the one it has for conversations with tools, or for all.
#[derive(Debug)]
pub struct ChatTemplate {
    /// Of the default one.
    source: Option<String>,
    default: Option<Compiled>,
    tool_use: Option<Compiled>,
    /// By the names that templates know them by.
    special_tokens: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Compiled {
    environment: Environment<'static>,
    takes_tools: bool,
    call_format: Option<CallFormat>,
    reasoning: Option<ReasoningTags>,
}

/// What a render depends on besides the messages.
#[derive(Debug, Clone, Copy, Default)]
pub struct RenderOptions<'a> {
    /// A JSON array of tools.
    pub tools_json: Option<&'a [u8]>,
    /// Ends with the head of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Ends with the last message's content, which the model continues: what the template writes
    /// behind it is cut off. Only [`Tokenizer::encode_chat`](crate::text::Tokenizer::encode_chat)
    /// looks at it.
    pub continue_final_message: bool,
    /// A JSON object of further variables (`enable_thinking`, `documents`, ...).
    pub kwargs_json: Option<&'a [u8]>,
    /// Most characters that may come out; none: as many as the fuel makes.
    pub max_characters: Option<usize>,
    /// Seconds since 1970.
    pub now: f64,
}

/// The parsed inputs of a render.
#[derive(Debug)]
pub(crate) struct Inputs {
    pub messages: Json,
    pub tools: Json,
    pub kwargs: Vec<(String, Json)>,
    add_generation_prompt: bool,
    num_bytes: usize,
    max_characters: Option<usize>,
    now: f64,
}

impl Inputs {
    pub fn parse(messages_json: &[u8], options: &RenderOptions) -> Result<Self> {
        let parse = |field: &str, json: &[u8]| {
            let text = std::str::from_utf8(json).map_err(|error| error.to_string());
            text.and_then(Json::parse).map_err(|error| Error::Template(format!("{field}: {error}")))
        };
        let messages = parse("messages", messages_json)?;
        let Json::Array(list) = &messages else {
            return Err(Error::Template("messages must be an array".to_owned()));
        };
        if let Some(index) = list.iter().position(|message| !matches!(message, Json::Object(_))) {
            return Err(Error::Template(format!("messages[{index}] must be an object")));
        }
        let tools = options.tools_json.map_or(Ok(Json::Null), |json| parse("tools", json))?;
        let kwargs =
            options.kwargs_json.map_or(Ok(Json::Object(Vec::new())), |json| parse("chat_template_kwargs", json))?;
        let Json::Object(kwargs) = kwargs else {
            return Err(Error::Template("chat_template_kwargs must be an object".to_owned()));
        };
        if let Some((name, _)) = kwargs.iter().find(|(name, _)| RESERVED.contains(&name.as_str())) {
            return Err(Error::Template(format!("chat_template_kwargs must not set {name}")));
        }
        let len = |json: Option<&[u8]>| json.map_or(0, <[u8]>::len);
        let num_bytes = messages_json.len() + len(options.tools_json) + len(options.kwargs_json);
        let add_generation_prompt = options.add_generation_prompt;
        let RenderOptions { max_characters, now, .. } = *options;
        Ok(Self { messages, tools, kwargs, add_generation_prompt, num_bytes, max_characters, now })
    }
}

impl ChatTemplate {
    /// Compiles the templates. A model without a default one cannot answer without tools.
    ///
    /// # Errors
    /// [`Error::Template`] says where one does not parse.
    pub fn new(
        default: Option<&str>,
        tool_use: Option<&str>,
        special_tokens: BTreeMap<String, String>,
    ) -> Result<Self> {
        Ok(Self {
            source: default.map(str::to_owned),
            default: default.map(Compiled::new).transpose()?,
            tool_use: tool_use.map(Compiled::new).transpose()?,
            special_tokens,
        })
    }

    /// The text of the default template.
    pub fn source(&self) -> Option<&str> {
        self.source.as_deref()
    }

    /// Whether tools reach the prompt: the template for them makes something of `tools`.
    pub fn takes_tools(&self) -> bool {
        self.with_tools().is_some_and(|compiled| compiled.takes_tools)
    }

    /// How the template for conversations with tools has the model write calls, where that is
    /// known.
    pub fn call_format(&self) -> Option<CallFormat> {
        self.with_tools().filter(|compiled| compiled.takes_tools)?.call_format
    }

    /// What stands around the model's reasoning, if the template tells it apart.
    pub fn reasoning(&self) -> Option<ReasoningTags> {
        self.default.as_ref().or(self.tool_use.as_ref())?.reasoning
    }

    fn with_tools(&self) -> Option<&Compiled> {
        self.tool_use.as_ref().or(self.default.as_ref())
    }

    /// Renders a conversation: a JSON array of messages.
    ///
    /// # Errors
    /// [`Error::Template`]: the JSON is wrong, the template refused the messages, or it ran out of
    /// fuel.
    pub fn render(&self, messages_json: &[u8], options: &RenderOptions) -> Result<String> {
        self.render_inputs(&Inputs::parse(messages_json, options)?)
    }

    pub(crate) fn render_inputs(&self, inputs: &Inputs) -> Result<String> {
        let with_tools = match &inputs.tools {
            Json::Array(tools) => !tools.is_empty(),
            tools => *tools != Json::Null,
        };
        let compiled = match (&self.default, &self.tool_use) {
            (_, Some(tool_use)) if with_tools => tool_use,
            (Some(default), _) => default,
            (None, _) => {
                let message = "chat template: the model has one for conversations with tools only: send tools, or \
                    name another with --chat-template";
                return Err(Error::Template(message.to_owned()));
            }
        };
        compiled.render(inputs, &self.special_tokens)
    }
}

impl Compiled {
    fn new(source: &str) -> Result<Self> {
        if source.len() > MAX_SOURCE_BYTES {
            let len = source.len();
            return Err(Error::Template(format!(
                "chat template has {len} bytes, but must have at most {MAX_SOURCE_BYTES}"
            )));
        }
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        let syntax = syntax.build().expect("the default delimiters are valid");
        template_limits::check(source, syntax.clone())?; // rewriting goes down chains too
        let (call_format, reasoning) = (CallFormat::of_template(source), ReasoningTags::of(|tag| source.contains(tag)));
        let source = rewrite(source);
        template_limits::check(&source, syntax.clone())?;
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_recursion_limit(RECURSION_LIMIT);
        environment.set_unknown_method_callback(python_methods::call);
        environment.set_formatter(|out, state, value| {
            out.write_str(&python_values::to_str(state, value)?).map_err(minijinja::Error::from)
        });
        environment.add_filter("tojson", python_values::to_json);
        environment.add_filter("string", python_values::to_str);
        environment.add_filter("trim", |state: &State, text: &Value, chars: Option<String>| {
            let text = python_values::to_str(state, text)?;
            let trims = |c: char| chars.as_ref().map_or_else(|| python_methods::is_space(c), |set| set.contains(c));
            Ok::<_, minijinja::Error>(text.trim_matches(trims).to_owned())
        });
        environment.add_filter(PERCENT_FILTER, |state: &mut State, text: Value, value: Value| {
            let mut args = vec![text];
            if value.is_tuple() {
                args.extend(value.try_iter()?);
            } else {
                args.push(value);
            }
            state.apply_filter("format", &args)
        });
        environment.add_filter("escape", python_values::escape);
        environment.add_filter("e", python_values::escape);
        environment.add_filter(BOUND_FILTER, python_values::bounded);
        environment.add_filter("sum", sum);
        environment.remove_filter("chain"); // not Jinja's, and one more way to add lists
        environment.add_function("namespace", |state: &State, kwargs: Kwargs| {
            let mut pairs = Vec::new();
            for name in kwargs.args() {
                pairs.push((name.to_owned(), python_values::bounded(state, kwargs.get::<Value>(name)?)?));
            }
            minijinja::functions::namespace(Some(Value::from_pairs(pairs).into()))
        });
        environment.add_test("iterable", is_iterable);
        environment.add_test("sequence", |value: &Value| value.is_undefined() || value.len().is_some());
        environment.add_filter(ITER_FILTER, |value: Value| {
            let refusal =
                || minijinja::Error::new(ErrorKind::InvalidOperation, format!("{} is not iterable", value.kind()));
            is_iterable(&value).then_some(()).ok_or_else(refusal).map(|()| value)
        });
        environment.add_function("raise_exception", raise_exception);
        environment.add_template_owned(NAME, source).map_err(|error| template_error(&error))?;
        let template = environment.get_template(NAME).map_err(|error| template_error(&error))?;
        let takes_tools = template.undeclared_variables(false).contains("tools");
        Ok(Self { environment, takes_tools, call_format, reasoning })
    }

    fn render(&self, inputs: &Inputs, special_tokens: &BTreeMap<String, String>) -> Result<String> {
        let num_messages = if let Json::Array(messages) = &inputs.messages { messages.len() as u64 } else { 0 };
        let mut environment = self.environment.clone();
        environment
            .set_fuel(Some(FUEL + FUEL_PER_MESSAGE * num_messages + FUEL_PER_INPUT_BYTE * inputs.num_bytes as u64));
        let now = inputs.now;
        environment.add_function("strftime_now", move |format: &str| {
            strftime(format, now).ok_or_else(|| {
                minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now cannot format {format:?}"))
            })
        });
        // Of two with one name the later counts.
        let mut variables: Vec<(&str, Value)> =
            special_tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str()))).collect();
        variables.extend([
            ("messages", to_value(&inputs.messages)),
            ("tools", to_value(&inputs.tools)),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(inputs.add_generation_prompt)),
        ]);
        variables.extend(inputs.kwargs.iter().map(|(name, value)| (name.as_str(), to_value(value))));
        let template = environment.get_template(NAME).map_err(|error| template_error(&error))?;
        let mut text = RenderedText::new(inputs.max_characters);
        let rendered = template.render_captured_to(Value::from_pairs(variables), &mut text).map(|_| ());
        text.finish(rendered.map_err(|error| template_error(&error)))
    }
}

/// What Python can loop over; jinja2's undefined values are empty.
fn is_iterable(value: &Value) -> bool {
    value.is_undefined() || (!value.is_none() && value.try_iter().is_ok()) || value.kind() == ValueKind::String
}

/// Refuses the messages.
fn raise_exception(state: &State, message: &Value) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, python_values::to_str(state, message)?))
}

/// Jinja's `sum`, of numbers only: of lists it would be one deep addition.
fn sum(
    state: &State,
    values: Value,
    attribute: Option<&str>,
    start: Option<Value>,
    kwargs: Kwargs,
) -> std::result::Result<Value, minijinja::Error> {
    let first = start.clone().or(kwargs.get::<Option<Value>>("start")?);
    if first.is_some_and(|start| !start.is_number() && !start.is_none()) {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "sum: only numbers can be added up"));
    }
    minijinja::filters::sum(state, values, attribute, start, kwargs)
}

fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => to_number(number),
        Json::Text(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(pairs) => Value::from_pairs(pairs.iter().map(|(key, value)| (key.as_str(), to_value(value)))),
    }
}

/// An integer of any size, or a float.
fn to_number(number: &str) -> Value {
    if number.contains(['.', 'e', 'E']) {
        return Value::from(number.parse::<f64>().unwrap_or(f64::NAN));
    }
    let integer = number.parse::<i64>().map(Value::from).or_else(|_| number.parse::<i128>().map(Value::from));
    integer.unwrap_or_else(|_| python_values::long_integer(number))
}

fn template_error(error: &minijinja::Error) -> Error {
    let line = error.line().map_or(String::new(), |line| format!(" (line {line})"));
    let message = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "ran out of fuel: it does too much work".to_owned(),
        (_, Some(detail)) => detail.to_owned(),
        (kind, None) => kind.to_string(),
    };
    Error::Template(format!("chat template: {message}{line}"))
}
