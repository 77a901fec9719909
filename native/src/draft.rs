//! Draft trees from a suffix automaton: what followed before, in contexts like the present one.
//!
//! Prediction by partial matching. Every suffix of the text that occurred before votes, the longest first; a shorter one
//! gets only what the longer ones leave to tokens that they have not seen follow. How much a context of some length may
//! claim is learned from this very text: each token that is added shows which context knew it. The tree then grows best
//! first, so a long match gives a deep chain and a short one a wide bush.

use std::cmp::Ordering;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::hash::BuildHasherDefault;

use crate::automaton::{Automaton, Mix, NONE, ROOT};

/// Tokens kept; beyond it the older half is forgotten. At most 2 states and 3 edges a token: about 16 MB when full.
pub const MAX_TOKENS: usize = 1 << 16;

/// What a context claims before the text has taught better: measured on chat and GSM8K answers of SmolLM2-135M (LOG),
/// and rounded. By length of the match: 0, 1, 2, 3, 4, 5-6, 7-9, 10-15, 16 and more.
const CLAIMS: [f64; 9] = [0.55, 0.40, 0.62, 0.66, 0.72, 0.75, 0.78, 0.86, 0.94];

/// The same for a context whose longer ones failed, whatever its length.
const CLAIM_AFTER_FAILURE: f64 = 0.37;

/// Observations that the first claims are worth.
const PRIOR_WEIGHT: f64 = 8.0;

/// Occurrences that being the latest one is worth.
const LATEST_BONUS: f64 = 1.0;

/// Nodes of one tree besides node 0; the walk's limit.
pub const MAX_BUDGET: usize = crate::walk::MAX_NODES - 1;

fn class(length: u32) -> usize {
    match length {
        0..=4 => length as usize,
        5..=6 => 5,
        7..=9 => 6,
        10..=15 => 7,
        _ => 8,
    }
}

#[derive(Clone, Copy, Default)]
struct Record {
    known: f64,
    seen: f64,
}

/// Tokens, parents and path probabilities; node 0 is the text's last token.
#[derive(Debug, Default, PartialEq)]
pub struct Draft {
    pub tokens: Vec<u32>,
    pub parents: Vec<i64>,
    pub scores: Vec<f64>,
}

/// A context: a string of `length` tokens that ends in `state`.
#[derive(Clone, Copy)]
struct Context {
    state: u32,
    length: u32,
}

#[derive(Clone, Copy)]
struct Candidate {
    score: f64,
    token: u32,
    context: Context,
}

/// A token that may follow, the state it leads to, and how often it did.
#[derive(Clone, Copy)]
struct Word {
    token: u32,
    state: u32,
    count: u32,
}

/// Tokens that no longer context has claimed; the sum of their counts and the place of the latest cover all of them.
#[derive(Default)]
struct Fresh {
    words: Vec<Word>,
    count: u64,
    latest: u32,
}

/// A candidate for the tree, ordered by score, then by who came first.
struct Waiting {
    candidate: Candidate,
    parent: usize,
    arrival: usize,
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.candidate.score.total_cmp(&other.candidate.score)).then(other.arrival.cmp(&self.arrival))
    }
}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Waiting {}

pub struct Drafter {
    automaton: Automaton,
    /// By class of length; [0]: contexts whose longer ones failed, [1]: longest ones.
    records: [[Record; CLAIMS.len()]; 2],
    max_tokens: usize,
}

impl Default for Drafter {
    fn default() -> Self {
        Self::new(MAX_TOKENS)
    }
}

impl Drafter {
    /// `max_tokens`: at least 2, at most MAX_TOKENS.
    pub fn new(max_tokens: usize) -> Self {
        Drafter {
            automaton: Automaton::default(),
            records: Default::default(),
            max_tokens: max_tokens.clamp(2, MAX_TOKENS),
        }
    }

    pub fn extend(&mut self, tokens: &[u32]) {
        for token in tokens {
            if self.automaton.text().len() >= self.max_tokens {
                self.forget_older_half();
            }
            self.learn(*token);
            self.automaton.push(*token);
        }
    }

    fn forget_older_half(&mut self) {
        let mut younger = Automaton::default();
        let text = self.automaton.text();
        for token in &text[text.len() - self.max_tokens / 2..] {
            younger.push(*token);
        }
        self.automaton = younger;
    }

    /// Takes note of which contexts knew that `token` could follow.
    fn learn(&mut self, token: u32) {
        let (mut state, mut longest, mut fanout) = (self.automaton.context(), 1, 0);
        while state != NONE {
            let found = *self.automaton.state(state);
            // What follows a context follows each of its suffixes too: no wider, nothing new to say.
            if found.fanout > fanout {
                let known = self.automaton.step(state, token).is_some();
                let record = &mut self.records[longest][class(found.length)];
                record.seen += 1.0;
                if known {
                    record.known += 1.0;
                    return;
                }
                longest = 0;
                fanout = found.fanout;
            }
            state = found.link;
        }
    }

    fn claim(&self, length: u32, longest: usize) -> f64 {
        let class = class(length);
        let prior = if longest == 1 {
            CLAIMS[class]
        } else {
            CLAIM_AFTER_FAILURE
        };
        let record = self.records[longest][class];
        (record.known + prior * PRIOR_WEIGHT) / (record.seen + PRIOR_WEIGHT)
    }

    /// A tree of up to `budget` nodes below the text's last token, best first. Empty for an empty text.
    pub fn draft(&self, budget: usize) -> Draft {
        let mut draft = Draft::default();
        let Some(last) = self.automaton.text().last() else {
            return draft;
        };
        let budget = budget.min(MAX_BUDGET);
        draft.tokens.push(*last);
        draft.parents.push(-1);
        draft.scores.push(1.0);
        let words = self.words();
        let mut waiting = BinaryHeap::new();
        let mut arrivals = 0;
        let state = self.automaton.context();
        let mut next = Candidate {
            score: 1.0,
            token: *last,
            context: Context {
                state,
                length: self.automaton.state(state).length,
            },
        };
        while draft.tokens.len() <= budget {
            let parent = draft.tokens.len() - 1;
            for candidate in self.candidates(next.context, next.score, budget, &words) {
                waiting.push(Waiting {
                    candidate,
                    parent,
                    arrival: arrivals,
                });
                arrivals += 1;
            }
            let Some(best) = waiting.pop() else {
                break;
            };
            next = best.candidate;
            draft.tokens.push(next.token);
            draft.parents.push(best.parent as i64);
            draft.scores.push(next.score);
        }
        draft
    }

    /// What may follow `context`, likeliest first (ties: lowest token), at most `limit`; scores are times `score`.
    fn candidates(&self, mut context: Context, score: f64, limit: usize, words: &[Word]) -> Vec<Candidate> {
        let mut found: Vec<Candidate> = Vec::new();
        let mut known: HashSet<u32, BuildHasherDefault<Mix>> = HashSet::default();
        let (mut left, mut longest) = (score, 1);
        loop {
            let state = *self.automaton.state(context.state);
            if state.fanout as usize > known.len() {
                let claim = self.claim(context.length, longest);
                let fresh = if context.state == ROOT {
                    self.fresh_words(&known, limit, words)
                } else {
                    self.fresh(context.state, &known)
                };
                let whole = fresh.count as f64 + LATEST_BONUS;
                for Word { token, state, count } in fresh.words {
                    let latest = self.automaton.state(state).last == fresh.latest;
                    let bonus = if latest { LATEST_BONUS } else { 0.0 };
                    known.insert(token);
                    found.push(Candidate {
                        score: left * claim * (f64::from(count) + bonus) / whole,
                        token,
                        context: Context {
                            state,
                            length: context.length + 1,
                        },
                    });
                }
                left *= 1.0 - claim;
                longest = 0;
            }
            if context.state == ROOT {
                break;
            }
            context = Context {
                state: state.link,
                length: self.automaton.state(state.link).length,
            };
        }
        let order = |a: &Candidate, b: &Candidate| b.score.total_cmp(&a.score).then(a.token.cmp(&b.token));
        if found.len() > limit && limit > 0 {
            found.select_nth_unstable_by(limit - 1, order);
            found.truncate(limit);
        }
        found.sort_unstable_by(order);
        found
    }

    /// What followed `state`, without the known tokens.
    fn fresh(&self, state: u32, known: &HashSet<u32, BuildHasherDefault<Mix>>) -> Fresh {
        let mut fresh = Fresh::default();
        for (token, state) in self.automaton.following(state) {
            if !known.contains(&token) {
                let to = self.automaton.state(state);
                fresh.count += u64::from(to.count);
                fresh.latest = fresh.latest.max(to.last);
                fresh.words.push(Word {
                    token,
                    state,
                    count: to.count,
                });
            }
        }
        fresh
    }

    /// The same for the root, whose tokens are all that the text has: no more than `limit` of them are listed, from
    /// `words`, which are sorted once a draft.
    fn fresh_words(&self, known: &HashSet<u32, BuildHasherDefault<Mix>>, limit: usize, words: &[Word]) -> Fresh {
        let text = self.automaton.text();
        let count_of = |token: &u32| {
            self.automaton
                .step(ROOT, *token)
                .map_or(0, |to| u64::from(self.automaton.state(to).count))
        };
        let all: u64 = words.iter().map(|word| u64::from(word.count)).sum();
        let latest = (text.iter().rposition(|token| !known.contains(token))).map_or(0, |place| place + 1);
        let mut fresh = Fresh {
            count: all - known.iter().map(count_of).sum::<u64>(),
            latest: latest as u32,
            words: Vec::new(),
        };
        let unknown = words.iter().filter(|word| !known.contains(&word.token));
        fresh.words.extend(unknown.take(limit));
        let newest = latest.checked_sub(1).map(|place| text[place]);
        if let Some(word) = words.iter().find(|word| Some(word.token) == newest) {
            if !fresh.words.iter().any(|listed| listed.token == word.token) {
                fresh.words.push(*word);
            }
        }
        fresh
    }

    /// The text's distinct tokens, most frequent first.
    fn words(&self) -> Vec<Word> {
        let mut words = self.fresh(ROOT, &HashSet::default()).words;
        words.sort_unstable_by_key(|word| (Reverse(word.count), word.token));
        words
    }
}
