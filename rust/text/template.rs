//! Chat templates: Jinja under fuel, with what Hugging Face adds to it.
//!
//! The environment is the one of `transformers`' `_compile_jinja_template`: `trim_blocks`,
//! `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now`, `tojson` as `json.dumps`, and
//! Python's string methods. A template comes with a model file and is not trusted: fuel bounds its
//! work, the recursion limit its stack, and nothing outside the messages can be reached from it.
//! Where minijinja asks for no fuel, `template_source.rs` sees to it.

use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, State, UndefinedBehavior, Value};
use serde_json::Value as Json;

use crate::error::{Error, Result};
use crate::text::clock::strftime;
use crate::text::template_source::{most_additions, rewrite, BOUND_FILTER, ITER_FILTER, MAX_ADDITIONS, PERCENT_FILTER};
use crate::text::{python_methods, python_values};

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

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Arc<str>,
    eos_token: Arc<str>,
}

/// What a render depends on besides the messages.
#[derive(Debug, Clone, Copy, Default)]
pub struct RenderOptions<'a> {
    /// A JSON array of tools.
    pub tools_json: Option<&'a str>,
    /// Ends with the head of the assistant's turn.
    pub add_generation_prompt: bool,
    /// A JSON object of further variables (`enable_thinking`, `documents`, ...).
    pub kwargs_json: Option<&'a str>,
    /// Seconds since 1970.
    pub now: f64,
}

/// The parsed inputs of a render.
#[derive(Debug)]
pub(crate) struct Inputs {
    pub messages: Json,
    pub tools: Json,
    pub kwargs: serde_json::Map<String, Json>,
    add_generation_prompt: bool,
    num_bytes: usize,
    now: f64,
}

impl Inputs {
    pub fn parse(messages_json: &str, options: &RenderOptions) -> Result<Self> {
        let parse = |field: &str, json: &str| {
            serde_json::from_str(json).map_err(|error| Error::Template(format!("{field}: {error}")))
        };
        let messages: Json = parse("messages", messages_json)?;
        let Some(list) = messages.as_array() else {
            return Err(Error::Template("messages must be an array".to_owned()));
        };
        if let Some(index) = list.iter().position(|message| !message.is_object()) {
            return Err(Error::Template(format!("messages[{index}] must be an object")));
        }
        let tools = options.tools_json.map_or(Ok(Json::Null), |json| parse("tools", json))?;
        let kwargs = options
            .kwargs_json
            .map_or(Ok(Json::Object(serde_json::Map::new())), |json| parse("chat_template_kwargs", json))?;
        let Json::Object(kwargs) = kwargs else {
            return Err(Error::Template("chat_template_kwargs must be an object".to_owned()));
        };
        if let Some(name) = RESERVED.iter().find(|name| kwargs.contains_key(**name)) {
            return Err(Error::Template(format!("chat_template_kwargs must not set {name}")));
        }
        let num_bytes =
            messages_json.len() + options.tools_json.map_or(0, str::len) + options.kwargs_json.map_or(0, str::len);
        let add_generation_prompt = options.add_generation_prompt;
        Ok(Self { messages, tools, kwargs, add_generation_prompt, num_bytes, now: options.now })
    }
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`Error::Template`] says where it does not parse.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self> {
        if source.len() > MAX_SOURCE_BYTES {
            let len = source.len();
            return Err(Error::Template(format!(
                "chat template has {len} bytes, but must have at most {MAX_SOURCE_BYTES}"
            )));
        }
        let additions = most_additions(source);
        if additions > MAX_ADDITIONS {
            return Err(Error::Template(format!(
                "chat template adds {additions} times in one tag, but may do so at most {MAX_ADDITIONS} times"
            )));
        }
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        environment.set_syntax(syntax.build().expect("the default delimiters are valid"));
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
        environment.add_template_owned(NAME, rewrite(source)).map_err(|error| template_error(&error))?;
        Ok(Self { environment, bos_token: bos_token.into(), eos_token: eos_token.into() })
    }

    /// Renders a conversation: a JSON array of messages.
    ///
    /// # Errors
    /// [`Error::Template`]: the JSON is wrong, the template refused the messages, or it ran out of
    /// fuel.
    pub fn render(&self, messages_json: &str, options: &RenderOptions) -> Result<String> {
        self.render_inputs(&Inputs::parse(messages_json, options)?)
    }

    pub(crate) fn render_inputs(&self, inputs: &Inputs) -> Result<String> {
        let num_messages = inputs.messages.as_array().map_or(0, Vec::len) as u64;
        let mut environment = self.environment.clone();
        environment
            .set_fuel(Some(FUEL + FUEL_PER_MESSAGE * num_messages + FUEL_PER_INPUT_BYTE * inputs.num_bytes as u64));
        let now = inputs.now;
        environment.add_function("strftime_now", move |format: &str| {
            strftime(format, now).ok_or_else(|| {
                minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now cannot format {format:?}"))
            })
        });
        let mut variables = vec![
            ("messages", to_value(&inputs.messages)),
            ("tools", to_value(&inputs.tools)),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(inputs.add_generation_prompt)),
            ("bos_token", Value::from(&*self.bos_token)),
            ("eos_token", Value::from(&*self.eos_token)),
        ];
        variables.extend(inputs.kwargs.iter().map(|(name, value)| (name.as_str(), to_value(value))));
        let template = environment.get_template(NAME).map_err(|error| template_error(&error))?;
        template.render(Value::from_pairs(variables)).map_err(|error| template_error(&error))
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
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (None, Some(integer)) => Value::from(integer),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(pairs) => Value::from_pairs(pairs.iter().map(|(key, value)| (key.as_str(), to_value(value)))),
    }
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
