//! Constraints become grammars: once each, while they are in use.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::api::ParserLimits;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{InferenceCapabilities, TokEnv};
use llguidance::{Matcher, ParserFactory};
use rustc_hash::FxHashMap;

use super::compiled::Compiled;
use super::constraint::Constraint;
use super::kind::ConstraintKind;
use super::schema;
use super::vocabulary::Vocabulary;
use super::Grammar;
use crate::error::{Error, Result};
use crate::text::Tokenizer;

/// Most grammars kept.
const MAX_KEPT: usize = 256;
/// Most bytes of kept grammars, as they are counted.
const MAX_KEPT_BYTES: usize = 256 << 20;
/// What is compiled of a byte of a text takes at most about so many, most of which the library does not count. It
/// is as much for a long text, and less for many short ones.
const BYTES_OF_A_BYTE: usize = 400;

/// What one constraint came to; filled in by the first who asks.
type Outcome = Arc<OnceLock<Result<Arc<dyn Grammar>>>>;

/// A grammar that is kept.
#[derive(Debug)]
struct Kept {
    outcome: Outcome,
    bytes: usize,
    /// When it was last asked for, by the cache's count.
    used: u64,
}

#[derive(Debug, Default)]
struct Cache {
    kept: FxHashMap<Constraint, Kept>,
    count: u64,
    stats: CompilerStats,
}

/// Counters and gauges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CompilerStats {
    /// Grammars that are kept.
    pub kept: usize,
    /// Their bytes: what the library counts, and at most what their texts come to.
    pub kept_bytes: usize,
    /// Counter: constraints compiled.
    pub compiled: u64,
    /// Counter: constraints found.
    pub found: u64,
    /// Counter: constraints refused.
    pub refused: u64,
}

/// Compiles constraints for one model. What is long in it runs in the caller's thread, so that is
/// not to be one that others wait for.
pub struct Compiler {
    tokenizer: Arc<Tokenizer>,
    vocab_size: u32,
    ends: Vec<u32>,
    /// Made when first needed: a second, and tens of megabytes, for the largest vocabularies.
    factory: OnceLock<ParserFactory>,
    cache: Mutex<Cache>,
}

impl fmt::Debug for Compiler {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Compiler").field("vocab_size", &self.vocab_size).finish_non_exhaustive()
    }
}

impl Compiler {
    /// `vocab_size`: of the model. `ends`: its end tokens; those outside of the vocabulary do not count.
    pub fn new(tokenizer: Arc<Tokenizer>, vocab_size: u32, ends: &[u32]) -> Self {
        let ends = ends.iter().copied().filter(|end| *end < vocab_size).collect();
        Self { tokenizer, vocab_size, ends, factory: OnceLock::new(), cache: Mutex::default() }
    }

    /// The grammar of a constraint, if it is kept.
    pub fn find(&self, constraint: &Constraint) -> Option<Arc<dyn Grammar>> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let cache = &mut *cache;
        let kept = cache.kept.get_mut(constraint)?;
        let grammar = kept.outcome.get()?.as_ref().ok()?;
        cache.count += 1;
        cache.stats.found += 1;
        kept.used = cache.count;
        Some(Arc::clone(grammar))
    }

    /// The grammar of a constraint, compiled unless it is kept. Who asks for one that another is
    /// compiling waits for it.
    ///
    /// # Errors
    /// [`Error::Constraint`], which says where in the text the fault is.
    pub fn compile(&self, constraint: &Constraint) -> Result<Arc<dyn Grammar>> {
        if let Some(grammar) = self.find(constraint) {
            return Ok(grammar);
        }
        let outcome = self.place(constraint);
        let mut bytes = 0;
        let result = outcome.get_or_init(|| {
            let (grammar, size) = self.build(constraint)?;
            bytes = size;
            Ok(grammar)
        });
        self.settle(constraint, &outcome, bytes);
        result.clone()
    }

    /// Counters and gauges.
    pub fn stats(&self) -> CompilerStats {
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let kept_bytes = cache.kept.values().map(|kept| kept.bytes).sum();
        CompilerStats { kept: cache.kept.len(), kept_bytes, ..cache.stats }
    }

    fn place(&self, constraint: &Constraint) -> Outcome {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.count += 1;
        let used = cache.count;
        let kept = cache.kept.entry(constraint.clone()).or_insert_with(|| Kept {
            outcome: Outcome::default(),
            bytes: constraint.text.len(),
            used,
        });
        Arc::clone(&kept.outcome)
    }

    /// Notes what has been compiled, forgets it if it failed, and forgets those that nobody asked
    /// for the longest where there are too many. Sequences that follow them go on.
    fn settle(&self, constraint: &Constraint, outcome: &Outcome, bytes: usize) {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let cache = &mut *cache;
        let failed = outcome.get().is_some_and(Result::is_err);
        if bytes > 0 {
            cache.stats.compiled += 1;
        }
        if failed {
            cache.stats.refused += 1;
            if cache.kept.get(constraint).is_some_and(|kept| Arc::ptr_eq(&kept.outcome, outcome)) {
                cache.kept.remove(constraint);
            }
        } else if let Some(kept) = cache.kept.get_mut(constraint) {
            kept.bytes = kept.bytes.max(bytes);
        }
        let mut total: usize = cache.kept.values().map(|kept| kept.bytes).sum();
        while cache.kept.len() > MAX_KEPT || total > MAX_KEPT_BYTES {
            // One that is being compiled has somebody who waits for it.
            let oldest = cache.kept.iter().filter(|(_, kept)| kept.outcome.get().is_some());
            let Some(oldest) = oldest.min_by_key(|(_, kept)| kept.used).map(|(text, _)| text.clone()) else { break };
            total -= cache.kept.remove(&oldest).map_or(0, |kept| kept.bytes);
        }
    }

    /// Compiles, and asks for the first mask: some grammars turn out to be too much only there.
    fn build(&self, constraint: &Constraint) -> Result<(Arc<dyn Grammar>, usize)> {
        let prepared = constraint.prepared()?;
        let factory = self.factory();
        let kind = constraint.kind;
        let parser = factory.create_parser(prepared).map_err(|error| {
            let reason = error.to_string();
            let place = if kind == ConstraintKind::Json { schema::locate(&constraint.text, factory) } else { None };
            refusal(kind, &reason, place.as_deref())
        })?;
        let bytes = BYTES_OF_A_BYTE * constraint.text.len() + parser.parser.lexer_stats().num_bytes;
        let mut matcher = Matcher::new(Ok(parser));
        matcher.compute_mask_or_eos().map_err(|error| refusal(kind, &error.to_string(), None))?;
        Ok((Arc::new(Compiled::new(matcher)), bytes.max(1)))
    }

    fn factory(&self) -> &ParserFactory {
        self.factory.get_or_init(|| {
            let env: TokEnv = Arc::new(Vocabulary::new(Arc::clone(&self.tokenizer), self.vocab_size, &self.ends));
            let slices = SlicedBiasComputer::general_slices();
            let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
                .expect("the library's own slices are good");
            factory.quiet();
            *factory.limits_mut() = limits();
            factory
        })
    }
}

/// Bounds of one grammar, in time and memory. The library's own bound a compilation to a tenth of a
/// second or two. What a mask may cost is lower than theirs: others wait for it. Half of their fuel is
/// 7 ms, ten times what the masks of ordinary schemas come to.
fn limits() -> ParserLimits {
    ParserLimits {
        step_lexer_fuel: 100_000,
        step_max_items: 25_000,
        max_lexer_states: 50_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// What to tell of a constraint that could not be compiled.
fn refusal(kind: ConstraintKind, reason: &str, place: Option<&str>) -> Error {
    let message = match place {
        Some(place) if !place.is_empty() => format!("at {place}: {reason}"),
        _ => reason.to_owned(),
    };
    let is_too_much = ["too complex", "too large", "too many", "fuel", "limit", "exceeded"];
    if is_too_much.iter().any(|word| reason.contains(word)) {
        kind.too_complex(message)
    } else {
        kind.invalid(message)
    }
}
