//! What will come next in one sequence, by what came before: prompt lookup (Saxena 2023, "Prompt
//! Lookup Decoding") and suffix decoding (Oliaro et al. 2024, `SuffixDecoding`, section 4).

use super::history::{History, Match, MOST_FOUND};
use super::store::{Store, END};
use crate::config::{Speculation, SpeculationMethod};

/// The part of drafts that is believed to be right before any has been tested.
const PRIOR_HITS: f32 = 0.5;
/// How many tests that counts as, of a sequence that tests all it is offered, and of one whose drafts
/// cost something: the others' tests stand for its own then.
const PRIOR_TESTS: f32 = 2.0;
const PRIOR_TESTS_SHARED: f32 = 24.0;
/// What an old test still counts after one more: of a sequence's own, where each is free and where it
/// costs a pass; of those of all; and of its own after a step in which nothing was tested. Where drafts
/// cost something, one more or less in ten that is right decides whether they pay: few tests say too
/// little.
const MEMORY: f32 = 0.95;
const MEMORY_OF_PASSES: f32 = 0.98;
const MEMORY_SHARED: f32 = 0.997;
const MEMORY_IDLE: f32 = 0.98;
/// Text of which no larger part than this comes as foretold is looked up again only behind so many more
/// tokens: to look costs more than all else of a drafter, and hardly any draft is missed.
const SELDOM: f32 = 0.15;
const TOKENS_UNREAD: u32 = 3;
/// Matches of one look: in the sequence's own text, and in both halves of its tenant's outputs.
const MOST_PATHS: usize = 3 * MOST_FOUND;
/// Stands in a plan for a draft that the device makes.
const MADE_LATER: u32 = 0;

/// How often drafts were right; old ones count less.
#[derive(Debug, Default)]
struct Hits {
    hits: f32,
    /// The sum of how sure they and the wrong ones were.
    tests: f32,
}

impl Hits {
    fn add(&mut self, is_hit: bool, sure: f32, memory: f32) {
        self.hits = self.hits * memory + f32::from(u8::from(is_hit));
        self.tests = self.tests * memory + sure;
    }

    /// Of `drafted` tokens the first `accepted` were right, and the next was wrong.
    fn add_run(&mut self, drafted: u32, accepted: u32, memory: f32) {
        for place in 0..drafted.min(accepted + 1) {
            self.add(place < accepted, 1.0, memory);
        }
    }

    fn fade(&mut self, memory: f32) {
        self.hits *= memory;
        self.tests *= memory;
    }

    /// The part that is right, by these tests and by so many others of which the part `prior` was.
    fn rate(&self, prior: f32, prior_tests: f32) -> f32 {
        (self.hits + prior_tests * prior) / (self.tests + prior_tests)
    }
}

/// How often the device's own drafts were right, of all sequences: what a new one is believed to be
/// worth, since its drafts cost a pass each and are not tested for nothing.
#[derive(Debug, Default)]
pub(crate) struct Shared(Hits);

impl Shared {
    /// The device has drafted `drafted` tokens for some sequence, of which the first `accepted` were
    /// right.
    pub fn tested(&mut self, drafted: u32, accepted: u32) {
        self.0.add_run(drafted, accepted, MEMORY_SHARED);
    }

    pub fn rate(&self) -> f32 {
        self.0.rate(PRIOR_HITS, PRIOR_TESTS)
    }
}

/// Foretells one sequence's tokens, and keeps count of how often it is right, whether or not
/// anybody has the drafts verified: so it is known at no cost what drafting would gain.
#[derive(Debug)]
pub(crate) struct Drafter {
    history: History,
    root: u128,
    /// The tokens that should come next, and how sure each is if those before it are right: the
    /// part of the earlier occurrences that went on so.
    foretold: Vec<u32>,
    sure: Vec<f32>,
    /// Tests of what was foretold, and what was believed before them: the part that is right, and how
    /// many tests that counts as.
    own: Hits,
    prior: (f32, f32),
    /// The same tests, however sure each was.
    plain: Hits,
    /// So many times more nothing is foretold.
    pause: u32,
}

impl Drafter {
    /// For a sequence whose tenant has the prefix hashes' `root`. It knows no token yet.
    pub fn new(config: &Speculation, root: u128) -> Self {
        Self {
            history: History::new(config.lookup_min as usize),
            root,
            foretold: Vec::new(),
            sure: Vec::new(),
            own: Hits::default(),
            prior: (PRIOR_HITS, PRIOR_TESTS),
            plain: Hits::default(),
            pause: 0,
        }
    }

    /// Tokens that nobody had to foretell: the prompt, and what was output before a preemption.
    pub fn read(&mut self, tokens: &[u32]) {
        self.history.extend(tokens);
    }

    /// New output: the foretold tokens are tested against it, up to the first that is wrong.
    pub fn follow(&mut self, tokens: &[u32]) {
        let mut num_right = 0;
        for ((token, foretold), sure) in tokens.iter().zip(&self.foretold).zip(&self.sure) {
            let is_hit = token == foretold;
            self.own.add(is_hit, *sure, MEMORY);
            self.plain.add(is_hit, 1.0, MEMORY);
            if !is_hit {
                break;
            }
            num_right += 1;
        }
        let is_right = num_right == tokens.len();
        let gone = if is_right { num_right } else { self.foretold.len() };
        self.foretold.drain(..gone);
        self.sure.drain(..gone);
        self.history.extend(tokens);
    }

    /// The device has drafted `drafted` tokens of its own, of which the first `accepted` were right.
    /// Without any, what was found earlier is believed a little less, and what others found more.
    pub fn tested(&mut self, drafted: u32, accepted: u32) {
        if drafted == 0 {
            self.own.fade(MEMORY_IDLE);
        }
        self.own.add_run(drafted, accepted, MEMORY_OF_PASSES);
    }

    /// Foretells the next tokens, at most `most`. shared: what the device's drafts for others were.
    pub fn foretell(&mut self, config: &Speculation, most: usize, store: &Store, shared: &Shared) {
        if config.adaptive && !config.method.is_on_device() {
            if self.foretold.len() > most / 2 {
                return; // as foretold so far, and goes on
            }
            if self.pause > 0 {
                self.pause -= 1;
                self.foretold.clear();
                self.sure.clear();
                return;
            }
            if self.plain.rate(PRIOR_HITS, PRIOR_TESTS) < SELDOM {
                self.pause = TOKENS_UNREAD;
            }
        }
        self.foretold.clear();
        self.sure.clear();
        match config.method {
            SpeculationMethod::Ngram => self.copy(config, most),
            SpeculationMethod::Suffix => self.vote(config, most, store),
            SpeculationMethod::Model => {
                self.prior = (shared.rate(), PRIOR_TESTS_SHARED);
                self.foretold.resize(most, MADE_LATER);
                self.sure.resize(most, 1.0);
            }
        }
    }

    /// What is foretold, at most `most` tokens, each with the chance that it and all before it are
    /// right.
    pub fn chances(&self, most: usize) -> impl Iterator<Item = f32> + '_ {
        let rate = self.own.rate(self.prior.0, self.prior.1);
        let mut chance = 1.0;
        self.sure.iter().take(most).map(move |sure| {
            chance *= (rate * sure).min(0.99);
            chance
        })
    }

    pub fn foretold(&self, len: usize) -> &[u32] {
        &self.foretold[..len]
    }

    /// Takes what came after the latest of the longest matches. Where it comes to the end of the
    /// text, it goes on with itself: a period is repeated.
    fn copy(&mut self, config: &Speculation, most: usize) {
        let text = self.history.tokens();
        let longest = config.lookup_max as usize;
        let mut best: Option<Match> = None;
        for found in self.history.matches(text, longest) {
            if best.is_none_or(|best| found.len > best.len) {
                best = Some(found);
            }
            if found.len == longest {
                break;
            }
        }
        let Some(found) = best else { return };
        for place in found.next..found.next + most {
            let token = match text.get(place) {
                Some(token) => *token,
                None => self.foretold[place - text.len()],
            };
            self.foretold.push(token);
            self.sure.push(1.0);
        }
    }

    /// Goes on as most of the longest matches did, in this text and in the tenant's outputs, while
    /// they are sure enough; the longer the match, the further.
    fn vote(&mut self, config: &Speculation, most: usize, store: &Store) {
        let text = self.history.tokens();
        let deepest = config.lookup_max as usize;
        let own = self.history.matches(text, deepest).map(|found| (text, found));
        // What came behind each of the longest matches, in a place of its own: a look allocates nothing.
        let mut all_paths: [&[u32]; MOST_PATHS] = [&[]; MOST_PATHS];
        let (mut longest, mut count) = (0, 0);
        for (tokens, found) in own.chain(store.matches(self.root, text, deepest)) {
            if found.len > longest {
                (longest, count) = (found.len, 0);
            }
            if found.len == longest {
                all_paths[count] = &tokens[found.next..];
                count += 1;
            }
        }
        let most = most.min(((longest as f32 * config.max_spec_factor) as usize).max(1));
        let mut chance = 1.0;
        for depth in 0..most {
            let paths = &mut all_paths[..count];
            let Some((token, votes, total)) = favourite(paths, depth) else { return };
            let sure = votes as f32 / total as f32;
            chance *= sure;
            if chance < config.min_token_prob {
                return;
            }
            self.foretold.push(token);
            self.sure.push(sure);
            count = keep(paths, |path| path.get(depth) == Some(&token));
        }
    }
}

/// Moves the paths that `stays` wants to the front, in their order, and says how many they are.
fn keep(paths: &mut [&[u32]], stays: impl Fn(&[u32]) -> bool) -> usize {
    let mut count = 0;
    for index in 0..paths.len() {
        if stays(paths[index]) {
            paths[count] = paths[index];
            count += 1;
        }
    }
    count
}

/// The token that most paths have at `depth`, how many do, and how many have any. Of equals the first, which
/// is the latest of the sequence's own.
fn favourite(paths: &[&[u32]], depth: usize) -> Option<(u32, u32, u32)> {
    let mut votes = [(0, 0); MOST_PATHS];
    let (mut kinds, mut total) = (0, 0);
    for token in paths.iter().filter_map(|path| path.get(depth).copied().filter(|token| *token != END)) {
        total += 1;
        if let Some((_, count)) = votes[..kinds].iter_mut().find(|(other, _)| *other == token) {
            *count += 1;
        } else {
            votes[kinds] = (token, 1);
            kinds += 1;
        }
    }
    let (token, count) = votes[..kinds].iter().rev().copied().max_by_key(|(_, count)| *count)?;
    Some((token, count, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn foretold(config: &Speculation, most: usize, text: &[u32], outputs: &[&[u32]]) -> Vec<u32> {
        let mut store = Store::new(config.lookup_min as usize, 1000);
        for output in outputs {
            store.add(0, output);
        }
        let mut drafter = Drafter::new(config, 0);
        drafter.read(text);
        drafter.foretell(config, most, &store, &Shared::default());
        assert_eq!(drafter.chances(9).count(), drafter.foretold.len());
        drafter.foretold
    }

    #[test]
    fn lookup_takes_the_longest_match_and_goes_on_with_a_period() {
        let config = Speculation { lookup_min: 2, lookup_max: 3, ..Speculation::default() };
        assert_eq!(foretold(&config, 4, &[1, 2, 3, 9, 9, 2, 3, 8, 1, 2, 3], &[]), [9, 9, 2, 3]);
        assert_eq!(foretold(&config, 4, &[1, 2, 1, 2], &[]), [1, 2, 1, 2]);
        assert_eq!(foretold(&config, 4, &[5, 1, 2, 6, 3, 4], &[]), Vec::<u32>::new());
    }

    #[test]
    fn suffixes_vote_and_look_no_further_than_they_are_long() {
        let config =
            Speculation { method: SpeculationMethod::Suffix, lookup_min: 2, lookup_max: 16, ..Speculation::default() };
        let outputs: [&[u32]; 3] = [&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 6], &[1, 2, 7, 8, 9]];
        assert_eq!(foretold(&config, 8, &[9, 1, 2], &outputs), [3, 4]);
        assert_eq!(foretold(&config, 8, &[9, 1, 2, 3], &outputs), [4, 6]);
        let sure = Speculation { min_token_prob: 0.7, ..config };
        assert_eq!(foretold(&sure, 8, &[9, 1, 2], &outputs), Vec::<u32>::new());
        assert_eq!(foretold(&sure, 8, &[1, 2, 3, 4, 0, 1, 2, 3], &[]), [4, 0, 1]);
    }

    #[test]
    fn learns_what_the_device_drafts_and_forgets_it_for_what_others_found() {
        let config = Speculation { method: SpeculationMethod::Model, ..Speculation::default() };
        let mut drafter = Drafter::new(&config, 0);
        let mut shared = Shared::default();
        let foretell = |drafter: &mut Drafter, shared: &Shared| drafter.foretell(&config, 3, &Store::new(2, 0), shared);
        foretell(&mut drafter, &shared);
        let chance = |drafter: &Drafter| drafter.chances(9).next().expect("as many as may be");
        assert_eq!((drafter.chances(9).count(), drafter.foretold(3)), (3, [MADE_LATER; 3].as_slice()));
        assert!((chance(&drafter) - PRIOR_HITS).abs() < 1e-6);
        for _ in 0..50 {
            drafter.tested(3, 3);
        }
        assert!(chance(&drafter) > 0.8);
        for _ in 0..300 {
            drafter.tested(3, 0);
            shared.tested(3, 1);
        }
        assert!(chance(&drafter) < 0.2);
        foretell(&mut drafter, &shared);
        for _ in 0..1000 {
            drafter.tested(0, 0);
        }
        assert!((chance(&drafter) - shared.rate()).abs() < 0.01 && (0.4..0.6).contains(&shared.rate()));
    }

    #[test]
    fn text_that_seldom_comes_as_foretold_is_looked_up_now_and_then() {
        let config = Speculation::default();
        let store = Store::new(2, 0);
        let mut drafter = Drafter::new(&config, 0);
        drafter.read(&[1, 2, 3, 1, 2]);
        let foretell = |drafter: &mut Drafter, next: [u32; 3]| {
            let mut count = 0;
            for token in next {
                drafter.follow(&[token]);
                drafter.foretell(&config, 4, &store, &Shared::default());
                count += usize::from(!drafter.foretold.is_empty());
            }
            count
        };
        // What follows 1, 2 is another token each time, until it is the same again and again.
        let wrong: Vec<usize> = (100..300).map(|token| foretell(&mut drafter, [token, 1, 2])).collect();
        let late: usize = wrong[100..].iter().sum();
        assert!(wrong[0] == 1 && (15..=35).contains(&late), "{late} of 100");
        let right: Vec<usize> = (0..60).map(|_| foretell(&mut drafter, [3, 1, 2])).collect();
        assert_eq!(right[50..], [3; 10]);
    }

    #[test]
    fn counts_how_often_it_is_right() {
        let config = Speculation { adaptive: false, ..Speculation::default() };
        let mut drafter = Drafter::new(&config, 0);
        let store = Store::new(2, 1000);
        drafter.read(&[1, 2, 3, 4, 1, 2]);
        drafter.foretell(&config, 4, &store, &Shared::default());
        let first = drafter.chances(1).next().expect("a match");
        assert!((first - PRIOR_HITS).abs() < 1e-6);
        for _ in 0..100 {
            for token in [3, 4, 1, 2] {
                drafter.follow(&[token]);
                drafter.foretell(&config, 4, &store, &Shared::default());
            }
        }
        assert!(drafter.chances(1).next().expect("a match") > 0.9);
        for token in 100..150 {
            drafter.follow(&[token]);
            drafter.follow(&[2]);
            drafter.follow(&[3]);
            drafter.foretell(&config, 4, &store, &Shared::default());
        }
        assert!(drafter.chances(1).next().expect("a match") < 0.3);
    }
}
