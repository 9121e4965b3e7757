//! Rewrites of a template's source, for what minijinja does not have or does not refuse.
//!
//! - `{% generation %} ... {% endgeneration %}` (a Hugging Face tag that marks the assistant's
//!   words for training) becomes `{% with %} ... {% endwith %}`, which has the same scope and
//!   whitespace rules and no other effect.
//! - `'...' % x` on a string literal becomes `'...' | python_percent(x)`.
//! - `for x in y` becomes `for x in (y) | python_iter`: to loop over None is an error in Python,
//!   nothing in minijinja.
//! - `set x = y` becomes `set x = (y) | bounded`, and after `for x in ...`, `macro f(x)`, `call(x)`
//!   and `with x = ...` comes `set x = (x) | bounded`: values that are given a name stay small
//!   enough to be dropped, are paid for, and hold no lazy sum of lists. minijinja copies sums that
//!   are more than 32 deep without asking for fuel, so it must never see one: a tag may add up to
//!   32 times, and begins with sums that are not deep at all.

/// Name of the filter that refuses what Python cannot loop over.
pub(crate) const ITER_FILTER: &str = "python_iter";
/// Name of the filter that refuses values that are nested too deep.
pub(crate) const BOUND_FILTER: &str = "bounded";
/// Name of the filter that stands for `%` on strings.
pub(crate) const PERCENT_FILTER: &str = "python_percent";

/// Rewrites a whole template.
pub(crate) fn rewrite(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        let (text, tag) = rest.split_at(start);
        out.push_str(text);
        if let Some(after_raw) = raw_block_end(tag) {
            out.push_str(&tag[..after_raw]);
            rest = &tag[after_raw..];
        } else if let Some(comment) = tag.strip_prefix("{#") {
            let end = comment.find("#}").map_or(tag.len(), |end| end + 4);
            out.push_str(&tag[..end]);
            rest = &tag[end..];
        } else if tag.starts_with("{%") || tag.starts_with("{{") {
            let closing = if tag.starts_with("{%") { "%}" } else { "}}" };
            let (inside, end) = scan_tag(&tag[2..], closing);
            out.push_str(&tag[..2]);
            out.push_str(&rewrite_tag(inside));
            rest = &tag[2 + end..];
        } else {
            out.push('{');
            rest = &tag[1..];
        }
    }
    out.push_str(rest);
    out
}

/// What follows if `tag` begins with `{% name %}`.
fn after_bare_tag<'a>(tag: &'a str, name: &str) -> Option<&'a str> {
    let control = ['-', '+'];
    let inside = tag.strip_prefix("{%")?;
    let word = inside.strip_prefix(control).unwrap_or(inside).trim_ascii_start().strip_prefix(name)?.trim_ascii_start();
    word.strip_prefix(control).unwrap_or(word).strip_prefix("%}")
}

/// Where a `{% raw %}` block that begins `tag` ends.
fn raw_block_end(tag: &str) -> Option<usize> {
    let mut rest = after_bare_tag(tag, "raw")?;
    while let Some(at) = rest.find("{%") {
        rest = &rest[at..];
        if let Some(after) = after_bare_tag(rest, "endraw") {
            return Some(tag.len() - after.len());
        }
        rest = &rest[2..];
    }
    Some(tag.len())
}

fn rewrite_tag(inside: &str) -> String {
    match inside.trim_matches(['-', '+']).trim() {
        "generation" => inside.replace("generation", "with"),
        "endgeneration" => inside.replace("endgeneration", "endwith"),
        statement if statement.starts_with("for ") => {
            let looped = rewrite_percent(&add_filter(inside, "in", &["if", "recursive"], ITER_FILTER));
            bind(&looped, &loop_names(statement))
        }
        statement if statement.starts_with("with ") => bind(&rewrite_percent(inside), &first_names(&statement[4..], 0)),
        statement if statement.starts_with("macro ") => bind(&rewrite_percent(inside), &first_names(statement, 1)),
        statement if statement.strip_prefix("call").is_some_and(|rest| rest.trim_start().starts_with('(')) => {
            let parameters = statement[4..].trim_start();
            bind(&rewrite_percent(inside), &first_names(&parameters[..brackets_len(parameters)], 1))
        }
        statement if statement.starts_with("set ") => rewrite_percent(&add_filter(inside, "=", &[], BOUND_FILTER)),
        _ => rewrite_percent(inside),
    }
}

fn tokens(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (token, after) = rest.split_at(token_len(rest));
        rest = after;
        (!token.is_empty()).then_some(token)
    })
}

/// The names between `for` and `in`.
fn loop_names(statement: &str) -> Vec<&str> {
    tokens(statement).skip(1).take_while(|token| *token != "in").filter(|token| token.starts_with(is_word)).collect()
}

/// The names that begin the parts which commas cut `text` into, at this depth of brackets.
fn first_names(text: &str, wanted_depth: usize) -> Vec<&str> {
    let mut names = Vec::new();
    let (mut depth, mut begins) = (0, wanted_depth == 0);
    for token in tokens(text).filter(|token| !token.trim().is_empty()) {
        match token {
            "(" | "[" | "{" => {
                depth += 1;
                begins = depth == wanted_depth && names.is_empty();
            }
            ")" | "]" | "}" => depth -= 1,
            "," if depth == wanted_depth => begins = true,
            _ => {
                if begins && token.starts_with(is_word) {
                    names.push(token);
                }
                begins = false;
            }
        }
    }
    names
}

/// The tag, followed by tags that bound what it has given names to; its whitespace control goes to
/// the last of them.
fn bind(inside: &str, names: &[&str]) -> String {
    let control = if inside.ends_with(['-', '+']) { &inside[inside.len() - 1..] } else { "" };
    let mut out = inside[..inside.len() - control.len()].to_owned();
    for name in names {
        out.extend(["%}{% set ", name, " = (", name, ")|", BOUND_FILTER, " "]);
    }
    out + control
}

/// Puts `filter` on the expression between the token `before` and one of `after` or the end of the
/// tag.
fn add_filter(inside: &str, before: &str, after: &[&str], filter: &str) -> String {
    let mut depth = 0;
    let mut start = None;
    let mut at = 0;
    while at < inside.len() {
        let token = &inside[at..at + token_len(&inside[at..])];
        match token {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ if depth == 0 && start.is_none() && token == before => start = Some(at + token.len()),
            _ if depth == 0 && start.is_some() && after.contains(&token) => break,
            // Whitespace control before the end of the tag.
            "-" | "+" if start.is_some() && at + 1 == inside.len() => break,
            _ => {}
        }
        at += token.len();
    }
    match start {
        Some(start) => {
            let (before, expression, after) = (&inside[..start], inside[start..at].trim(), &inside[at..]);
            format!("{before} ({expression})|{filter} {after}")
        }
        None => inside.to_owned(),
    }
}

/// The inside of a tag and where it ends; a closing mark inside a string or brackets does not count.
fn scan_tag<'a>(tag: &'a str, closing: &str) -> (&'a str, usize) {
    let (mut at, mut depth) = (0, 0);
    while at < tag.len() {
        if depth == 0 && tag[at..].starts_with(closing) {
            return (&tag[..at], at);
        }
        match tag.as_bytes()[at] {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        at += token_len(&tag[at..]);
    }
    (tag, tag.len())
}

/// Length of the string literal, name or character that `text` begins with.
fn token_len(text: &str) -> usize {
    let mut chars = text.char_indices();
    let Some((_, first)) = chars.next() else { return 0 };
    if first == '"' || first == '\'' {
        let mut escaped = false;
        for (at, c) in chars {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                _ if c == first => return at + 1,
                _ => {}
            }
        }
        return text.len();
    }
    if is_word(first) {
        return text.find(|c| !is_word(c)).unwrap_or(text.len());
    }
    first.len_utf8()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn rewrite_percent(expression: &str) -> String {
    let mut out = String::with_capacity(expression.len());
    let mut at = 0;
    while at < expression.len() {
        let len = token_len(&expression[at..]);
        out.push_str(&expression[at..at + len]);
        let is_string = expression[at..].starts_with(['"', '\'']);
        at += len;
        let after = &expression[at..];
        let Some(operand) = after.trim_start().strip_prefix('%').filter(|_| is_string) else { continue };
        let operand = operand.trim_start();
        let len = operand_len(operand);
        if len > 0 {
            out.extend([" | ", PERCENT_FILTER, "(", &rewrite_percent(&operand[..len]), ")"]);
            at = expression.len() - operand.len() + len;
        }
    }
    out
}

/// Length of the operand that `text` begins with: what binds tighter than `%` (a sign, a literal, a
/// name or brackets, then attributes, subscripts, calls and filters).
fn operand_len(text: &str) -> usize {
    let mut at = text.len() - text.trim_start_matches(['-', '+', ' ']).len();
    match text[at..].chars().next() {
        Some('(' | '[' | '{') => at += brackets_len(&text[at..]),
        Some(c) if is_word(c) || c == '"' || c == '\'' => at += token_len(&text[at..]),
        _ => return 0,
    }
    loop {
        let rest = &text[at..];
        let spaces = rest.len() - rest.trim_start().len();
        let next = &rest[spaces..];
        at += match next.chars().next() {
            Some('(' | '[') => spaces + brackets_len(next),
            Some(mark @ ('.' | '|')) => {
                let name = next[mark.len_utf8()..].trim_start();
                match token_len(name) {
                    len if name.starts_with(is_word) => spaces + (next.len() - name.len()) + len,
                    _ => return at,
                }
            }
            _ => return at,
        };
    }
}

/// Length of the bracketed expression that `text` begins with.
fn brackets_len(text: &str) -> usize {
    let (mut at, mut depth) = (0, 0);
    while at < text.len() {
        match text.as_bytes()[at] {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        at += token_len(&text[at..]);
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::rewrite;

    #[test]
    fn percent_binds_as_in_python() {
        for (source, expected) in [
            ("{{ 'a' + '%s' % x.y[0]|upper + 'b' }}", "{{ 'a' + '%s' | python_percent(x.y[0]|upper) + 'b' }}"),
            ("{{ \"%d-%s\" % (i, f('}}')) }}", "{{ \"%d-%s\" | python_percent((i, f('}}'))) }}"),
            ("{% if i % 2 == 0 %}'%s' % x{% endif %}", "{% if i % 2 == 0 %}'%s' % x{% endif %}"),
            (
                "{% if x == '%' %}{{ '%s'%('%s' % y) }}",
                "{% if x == '%' %}{{ '%s' | python_percent(('%s' | python_percent(y))) }}",
            ),
            ("{% raw %}{{ '%s' % x }}{% endraw %}", "{% raw %}{{ '%s' % x }}{% endraw %}"),
            ("{# '%s' % x #}{", "{# '%s' % x #}{"),
            ("{#}'%s' % {{ x }}#}{{ '%s' % x }}", "{#}'%s' % {{ x }}#}{{ '%s' | python_percent(x) }}"),
            ("{{ {'a': {'b': 1}}, '%s' % x }}", "{{ {'a': {'b': 1}}, '%s' | python_percent(x) }}"),
            (
                "{%- raw +%}{% endraw x %}{{ '%s' % x }}{%+endraw-%}{{ '%s' % x }}",
                "{%- raw +%}{% endraw x %}{{ '%s' % x }}{%+endraw-%}{{ '%s' | python_percent(x) }}",
            ),
        ] {
            assert_eq!(rewrite(source), expected);
        }
    }

    #[test]
    fn loops_and_assignments_keep_their_parts() {
        for (source, expected) in [
            ("{% for x in a[1:] %}", "{% for x in (a[1:])|python_iter %}{% set x = (x)|bounded %}"),
            (
                "{%- for k, v in d|dictsort if v in w -%}",
                "{%- for k, v in (d|dictsort)|python_iter if v in w %}{% set k = (k)|bounded %}{% set v = (v)|bounded -%}",
            ),
            (
                "{% for x in f(1 if a else b), 2 recursive %}",
                "{% for x in (f(1 if a else b), 2)|python_iter recursive %}{% set x = (x)|bounded %}",
            ),
            (
                "{% macro f(a, b=[1, c], d=g(e, h)) -%}",
                "{% macro f(a, b=[1, c], d=g(e, h)) %}{% set a = (a)|bounded %}{% set b = (b)|bounded %}\
                 {% set d = (d)|bounded -%}",
            ),
            ("{% macro f() %}{% call f(x) %}", "{% macro f() %}{% call f(x) %}"),
            ("{% call(x) f(y, z) %}", "{% call(x) f(y, z) %}{% set x = (x)|bounded %}"),
            (
                "{% with a = f(b, c), d = 2 %}",
                "{% with a = f(b, c), d = 2 %}{% set a = (a)|bounded %}{% set d = (d)|bounded %}",
            ),
        ] {
            assert_eq!(rewrite(source), expected);
        }
    }

    #[test]
    fn generation_blocks_keep_their_whitespace_control() {
        assert_eq!(rewrite("{%- generation -%} x {%+ endgeneration %}"), "{%- with -%} x {%+ endwith %}");
    }
}
