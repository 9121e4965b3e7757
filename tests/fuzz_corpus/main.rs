//! Replays the corpus of `make fuzz`: inputs that reached code which no other input had reached,
//! and past findings.

mod checks;

use std::path::Path;

fn replay(target: &str, check: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&folder).expect("the corpus is committed");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("it can be listed").path()).collect();
    paths.sort();
    assert!(paths.len() >= 10, "{} has {} inputs", folder.display(), paths.len());
    for path in paths {
        println!("{}", path.display()); // shown where the check fails
        check(&std::fs::read(&path).expect("it can be read"));
    }
}

#[test]
fn gguf() {
    replay("gguf", checks::gguf);
}

#[test]
fn template() {
    replay("template", checks::template);
}
