//! An online suffix automaton over token ids that counts how often each of its strings occurred.
//!
//! Blumer et al. (1985), built token by token; amortised constant time. Each state stands for strings that end at the same
//! places of the text; its suffix link leads to the longest shorter suffix that ends at more places.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

pub const ROOT: u32 = 0;
pub const NONE: u32 = u32::MAX;

/// Suffix links climbed per token to count its occurrences. Only text that repeats itself without end has deeper ones
/// (a run of n equal tokens has n), and there the longest matches decide.
const CLIMB: usize = 64;

#[derive(Clone, Copy)]
pub struct State {
    /// Length of the state's longest string.
    pub length: u32,
    pub link: u32,
    /// How often its strings occurred, and where they did last (tokens up to there).
    pub count: u32,
    pub last: u32,
    /// Distinct tokens that followed.
    pub fanout: u32,
    first_edge: u32,
}

#[derive(Clone, Copy)]
struct Edge {
    token: u32,
    to: u32,
    next: u32,
}

/// Mixes a 64-bit key; the keys are dense numbers of our own making, so two multiplications do.
#[derive(Default)]
pub struct Mix(u64);

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u64(&mut self, key: u64) {
        let x = (self.0 ^ key).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = (x ^ (x >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    }
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }
}

pub struct Automaton {
    states: Vec<State>,
    edges: Vec<Edge>,
    index: HashMap<u64, u32, BuildHasherDefault<Mix>>,
    text: Vec<u32>,
    /// The state of the whole text.
    whole: u32,
}

fn key(state: u32, token: u32) -> u64 {
    u64::from(state) << 32 | u64::from(token)
}

impl Default for Automaton {
    fn default() -> Self {
        let root = State {
            length: 0,
            link: NONE,
            count: 0,
            last: 0,
            fanout: 0,
            first_edge: NONE,
        };
        Automaton {
            states: vec![root],
            edges: Vec::new(),
            index: HashMap::default(),
            text: Vec::new(),
            whole: ROOT,
        }
    }
}

impl Automaton {
    pub fn text(&self) -> &[u32] {
        &self.text
    }

    pub fn state(&self, state: u32) -> &State {
        &self.states[state as usize]
    }

    /// The longest suffix of the text that occurred before; NONE for an empty text.
    pub fn context(&self) -> u32 {
        self.state(self.whole).link
    }

    /// Where `token` leads from `state`.
    pub fn step(&self, state: u32, token: u32) -> Option<u32> {
        self.index
            .get(&key(state, token))
            .map(|edge| self.edges[*edge as usize].to)
    }

    /// Tokens that followed the state's strings, and where they lead.
    pub fn following(&self, state: u32) -> impl Iterator<Item = (u32, u32)> + '_ {
        let mut edge = self.state(state).first_edge;
        std::iter::from_fn(move || {
            let found = self.edges.get(edge as usize)?; // NONE is past every edge
            edge = found.next;
            Some((found.token, found.to))
        })
    }

    fn add_edge(&mut self, from: u32, token: u32, to: u32) {
        let state = &mut self.states[from as usize];
        let edge = self.edges.len() as u32;
        self.edges.push(Edge {
            token,
            to,
            next: state.first_edge,
        });
        state.first_edge = edge;
        state.fanout += 1;
        self.index.insert(key(from, token), edge);
    }

    /// Appends one token. The caller bounds the text's length far below 2^31, so states and edges fit 32 bits.
    pub fn push(&mut self, token: u32) {
        self.text.push(token);
        let end = self.text.len() as u32;
        let new = self.states.len() as u32;
        let before = self.whole;
        self.states.push(State {
            length: self.state(before).length + 1,
            link: ROOT,
            count: 0,
            last: end,
            fanout: 0,
            first_edge: NONE,
        });
        self.whole = new;
        let mut from = before;
        while from != NONE && !self.index.contains_key(&key(from, token)) {
            self.add_edge(from, token, new);
            from = self.state(from).link;
        }
        if from != NONE {
            self.states[new as usize].link = self.suffix(from, token);
        }
        self.count_occurrence(new, end);
    }

    /// The state of exactly (longest string of `from`, `token`): what `token` leads to, split if that has longer ones.
    fn suffix(&mut self, from: u32, token: u32) -> u32 {
        let Some(target) = self.step(from, token) else {
            return ROOT;
        };
        let length = self.state(from).length + 1;
        if length == self.state(target).length {
            return target;
        }
        let split = self.states.len() as u32;
        let copy = State {
            length,
            fanout: 0,
            first_edge: NONE,
            ..*self.state(target)
        };
        self.states.push(copy);
        let edges: Vec<_> = self.following(target).collect();
        for (token, to) in edges {
            self.add_edge(split, token, to);
        }
        let mut state = from;
        while state != NONE {
            match self.index.get(&key(state, token)) {
                Some(edge) if self.edges[*edge as usize].to == target => {
                    self.edges[*edge as usize].to = split;
                }
                _ => break,
            }
            state = self.state(state).link;
        }
        self.states[target as usize].link = split;
        split
    }

    fn count_occurrence(&mut self, mut state: u32, end: u32) {
        for _ in 0..CLIMB {
            if state == ROOT {
                return;
            }
            let found = &mut self.states[state as usize];
            found.count += 1;
            found.last = end;
            state = found.link;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_knows_every_substring_and_its_count(text in prop::collection::vec(0u32..3, 1..40)) {
            let mut automaton = Automaton::default();
            text.iter().for_each(|token| automaton.push(*token));
            for from in 0..text.len() {
                let mut state = ROOT;
                for to in from..text.len() {
                    let next = automaton.step(state, text[to]);
                    prop_assert!(next.is_some());
                    state = next.unwrap_or(ROOT);
                    let wanted = &text[from..=to];
                    let ends: Vec<_> = (wanted.len()..=text.len()).filter(|e| text[..*e].ends_with(wanted)).collect();
                    prop_assert_eq!(automaton.state(state).count as usize, ends.len());
                    prop_assert_eq!(automaton.state(state).last as usize, ends[ends.len() - 1]);
                }
            }
        }

        #[test]
        fn it_stays_linear_in_the_text(text in prop::collection::vec(0u32..4, 2..300)) {
            let mut automaton = Automaton::default();
            text.iter().for_each(|token| automaton.push(*token));
            prop_assert!(automaton.states.len() <= 2 * text.len());
            // Copied edges of split states replace none: every edge is live, and there are at most 3n of them.
            prop_assert!(automaton.edges.len() <= 3 * text.len());
            prop_assert_eq!(automaton.edges.len(), automaton.index.len());
        }

        #[test]
        fn the_context_is_the_longest_suffix_that_occurred_before(text in prop::collection::vec(0u32..3, 1..40)) {
            let mut automaton = Automaton::default();
            text.iter().for_each(|token| automaton.push(*token));
            let longest = (0..text.len())
                .find(|n| text[..text.len() - 1].windows((text.len() - n).max(1)).any(|w| w == &text[*n..]))
                .map_or(0, |n| text.len() - n);
            prop_assert_eq!(automaton.state(automaton.context()).length as usize, longest);
        }
    }
}
