//! The loads: what users send to a server that has too little room for it.

use crate::model::Asked;
use _core::config::CoreConfig;

/// A 7B on an 80 GB card.
pub fn card() -> CoreConfig {
    CoreConfig {
        num_blocks: 1720,
        block_size: 64,
        max_num_seqs: 256,
        max_num_batched_tokens: 8192,
        max_model_len: 4096,
        vocab_size: 32_000,
        max_waiting: 1 << 20,
        enable_prefix_caching: false,
        ..CoreConfig::default()
    }
}

pub fn prompt(len: u32, number: u32) -> Vec<u32> {
    (0..len).map(|token| (token * 7 + number * 13) % 32_000).collect()
}

/// 512 requests of 512 in, 256 out: all lengths are known.
pub fn uniform() -> Vec<Asked> {
    let asked = |number| Asked { prompt: prompt(512, number), max_tokens: Some(256), stops_after: None, priority: 0 };
    (0..512).map(asked).collect()
}

/// Chats whose answers end by themselves: log-normal lengths, in 250 and out 350 on average.
pub fn chats(count: u32, max_tokens: Option<i64>) -> Vec<Asked> {
    answered(count, max_tokens, 12_345, |state| log_normal(state, 5.6, 0.7).clamp(8, 1500))
}

/// Prompts as in chats, with answers of lengths of another kind.
fn answered(count: u32, max_tokens: Option<i64>, seed: u64, answer: impl Fn(&mut u64) -> u32) -> Vec<Asked> {
    let mut state = seed;
    (0..count)
        .map(|number| {
            let len = log_normal(&mut state, 5.5, 0.8).clamp(16, 1500);
            let stops_after = Some(answer(&mut state));
            Asked { prompt: prompt(len, number), max_tokens, stops_after, priority: 0 }
        })
        .collect()
}

fn log_normal(state: &mut u64, mean: f64, deviation: f64) -> u32 {
    let (a, b) = (uniform_number(state).max(1e-12), uniform_number(state));
    let normal = (-2.0 * a.ln()).sqrt() * (2.0 * std::f64::consts::PI * b).cos();
    (mean + deviation * normal).exp() as u32
}

/// From 0 to 1.
pub fn uniform_number(state: &mut u64) -> f64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    ((*state >> 33) as f64) / (1u64 << 31) as f64
}

/// Loads that no constant of the scheduler was chosen by, with answers that end by themselves.
pub fn held_out() -> Vec<(String, CoreConfig, Vec<Asked>)> {
    type Answer = fn(&mut u64) -> u32;
    let answers: [(&str, Answer); 5] = [
        ("other chats", |state| log_normal(state, 5.6, 0.7).clamp(8, 1500)),
        ("short answers", |state| log_normal(state, 2.5, 0.6).clamp(2, 200)),
        ("long answers", |state| log_normal(state, 6.9, 0.5).clamp(100, 2500)),
        ("one in ten is long", |state| if uniform_number(state) < 0.1 { 2000 } else { 30 }),
        ("all of one length", |_| 700),
    ];
    let mut loads = Vec::new();
    for (num_blocks, pool) in [(1720, "110k"), (430, "27k")] {
        for (name, answer) in answers {
            let config = CoreConfig { num_blocks, enable_prefix_caching: true, ..card() };
            loads.push((format!("{name}, pool {pool}"), config, answered(600, None, 99, answer)));
        }
    }
    loads
}

/// The loads that a scheduler may lose throughput in: name, configuration, requests.
pub fn all() -> Vec<(String, CoreConfig, Vec<Asked>)> {
    let mut loads = vec![("uniform".to_string(), card(), uniform())];
    let cached = |num_blocks| CoreConfig { num_blocks, enable_prefix_caching: true, ..card() };
    for (num_blocks, pool) in [(1720, "110k"), (860, "55k"), (430, "27k")] {
        for (max_tokens, limit) in [(None, "open"), (Some(1500), "1,500")] {
            let name = format!("chats, {limit} length, pool {pool}");
            loads.push((name, cached(num_blocks), chats(1000, max_tokens)));
        }
        let config = CoreConfig { max_model_len: 32_768.min((num_blocks - 2) * 64), ..cached(num_blocks) };
        loads.push((format!("chats, open length, 32k model, pool {pool}"), config, chats(1000, None)));
    }
    // As Gemma 3: one full group and five with windows, on the bytes of 27k tokens.
    let windows = CoreConfig { kv_windows: vec![0, 1024, 1024, 1024, 1024, 1024], ..cached(430 * 6) };
    loads.push(("chats, 1,500 length, windows, pool 27k".to_string(), windows, chats(400, Some(1500))));
    loads
}
