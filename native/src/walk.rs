//! The walk down a draft tree, as far as the target agrees.

use crate::noise::Place;
use crate::row::{Row, RowError};
use crate::sample::{draw, logprob, Room, Warp};

/// Nodes of one tree; `lattica_infer/spec/tree.py` has the same bound.
pub const MAX_NODES: usize = 4096;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WalkError {
    /// Not a tree whose parents come first, or too many nodes.
    Tree(String),
    /// An argument out of its range.
    Argument(String),
    /// The row of a visited node.
    Row { node: usize, error: RowError },
}

/// Emitted tokens (accepted ones, then the correction or bonus), accepted nodes without node 0, and
/// log-probabilities of the emitted tokens where they were asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    pub tokens: Vec<u32>,
    pub path: Vec<u32>,
    pub logprobs: Vec<f32>,
}

/// A checked tree: `first_child[u]` and `next_sibling[u]` in index order.
pub struct Tree<'a> {
    tokens: &'a [u32],
    first_child: Vec<u32>,
    next_sibling: Vec<u32>,
}

const NONE: u32 = u32::MAX;

impl<'a> Tree<'a> {
    pub fn new(tokens: &'a [u32], parents: &[i64], vocabulary: usize) -> Result<Self, WalkError> {
        let nodes = tokens.len();
        if nodes == 0 || nodes > MAX_NODES || parents.len() != nodes {
            return Err(WalkError::Tree(format!(
                "a draft tree has 1 to {MAX_NODES} nodes and as many parents, not {nodes} and {}",
                parents.len()
            )));
        }
        if parents[0] != -1 {
            return Err(WalkError::Tree(format!("node 0 has parent {}, not -1", parents[0])));
        }
        if let Some((node, token)) = tokens.iter().enumerate().find(|(_, t)| **t as usize >= vocabulary) {
            return Err(WalkError::Tree(format!(
                "node {node} has token {token}, the vocabulary has {vocabulary}"
            )));
        }
        let mut first_child = vec![NONE; nodes];
        let mut next_sibling = vec![NONE; nodes];
        // From the back, so that each list of children ends up in index order.
        for node in (1..nodes).rev() {
            match usize::try_from(parents[node]) {
                Ok(parent) if parent < node => {
                    next_sibling[node] = first_child[parent];
                    first_child[parent] = node as u32;
                }
                _ => {
                    return Err(WalkError::Tree(format!(
                        "node {node} has parent {}; parents come before their children",
                        parents[node]
                    )))
                }
            }
        }
        Ok(Tree {
            tokens,
            first_child,
            next_sibling,
        })
    }

    /// The child of `node` that carries `token`; of equal ones the lowest index.
    fn child(&self, node: usize, token: u32) -> Option<usize> {
        let mut child = self.first_child[node];
        while child != NONE {
            if self.tokens[child as usize] == token {
                return Some(child as usize);
            }
            child = self.next_sibling[child as usize];
        }
        None
    }
}

/// Walks with any source of target tokens: `next(node, depth)` is what follows the path to `node`.
pub fn walk_with<E>(
    tree: &Tree<'_>,
    mut next: impl FnMut(usize, u64) -> Result<u32, E>,
) -> Result<(Vec<u32>, Vec<u32>), E> {
    let (mut tokens, mut path) = (Vec::new(), Vec::new());
    let mut node = 0;
    loop {
        let token = next(node, path.len() as u64)?;
        tokens.push(token);
        match tree.child(node, token) {
            Some(child) => {
                path.push(child as u32);
                node = child;
            }
            None => return Ok((tokens, path)),
        }
    }
}

/// Walks with the target's logits, `rows` of shape [nodes, vocabulary]; node 0 stands at `place.position`.
pub fn walk(
    tree: &Tree<'_>,
    rows: &[f32],
    vocabulary: usize,
    place: Place,
    warp: Warp,
    logprobs: bool,
) -> Result<Verdict, WalkError> {
    if vocabulary == 0 || vocabulary > u32::MAX as usize || rows.len() != tree.tokens.len() * vocabulary {
        return Err(WalkError::Argument(format!(
            "{} nodes need rows of shape [{0}, vocabulary], not {} values of {vocabulary} each",
            tree.tokens.len(),
            rows.len()
        )));
    }
    if !(warp.temperature >= 0.0 && warp.temperature.is_finite()) {
        return Err(WalkError::Argument(format!(
            "temperature is {}; it is finite and at least 0",
            warp.temperature
        )));
    }
    if !(warp.top_p > 0.0 && warp.top_p <= 1.0) {
        return Err(WalkError::Argument(format!(
            "top_p is {}; it is above 0 and at most 1",
            warp.top_p
        )));
    }
    if place.position > (i64::MAX as u64) - MAX_NODES as u64 {
        return Err(WalkError::Argument(format!(
            "position {} is out of range",
            place.position
        )));
    }
    let mut maxima = Vec::new();
    let mut room = Room::default();
    let mut found = Vec::new();
    let (tokens, path) = walk_with(tree, |node, depth| {
        let logits = &rows[node * vocabulary..][..vocabulary];
        let row = Row::new(logits, &mut maxima).map_err(|error| WalkError::Row { node, error })?;
        let here = Place {
            position: place.position + depth + 1,
            ..place
        };
        let token = draw(&row, warp, here, &mut room);
        if logprobs {
            found.push(logprob(&row, token));
        }
        Ok(token)
    })?;
    Ok(Verdict {
        tokens,
        path,
        logprobs: found,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GREEDY: Warp = Warp {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
    };
    const HERE: Place = Place { seed: 1, position: 0 };

    #[test]
    fn the_walk_goes_down_where_the_target_agrees_and_stops_where_not() {
        let tokens = [5, 17, 9, 17];
        let tree = Tree::new(&tokens, &[-1, 0, 1, 0], 20).expect("a tree");
        let mut rows = vec![0.0; 80];
        rows[17] = 1.0; // after node 0
        rows[20 + 9] = 1.0; // after node 1, the first of two children with 17
        rows[40 + 3] = 1.0; // after node 2
        let verdict = walk(&tree, &rows, 20, HERE, GREEDY, true).expect("a walk");
        assert_eq!((verdict.tokens, verdict.path), (vec![17, 9, 3], vec![1, 2]));
        assert_eq!(verdict.logprobs.len(), 3);
    }

    #[test]
    fn only_visited_rows_are_looked_at() {
        let tree = Tree::new(&[0, 1, 2], &[-1, 0, 0], 3).expect("a tree");
        let mut rows = vec![0.0; 9];
        rows[1] = 1.0;
        rows[8] = f32::NAN; // node 2
        assert!(walk(&tree, &rows, 3, HERE, GREEDY, false).is_ok());
        rows[4] = f32::NAN; // node 1
        let error = RowError::NotANumber;
        assert_eq!(
            walk(&tree, &rows, 3, HERE, GREEDY, false),
            Err(WalkError::Row { node: 1, error })
        );
    }

    proptest! {
        #[test]
        fn no_tree_and_no_setting_panics(
            tokens in prop::collection::vec(0u32..6, 0..9),
            parents in prop::collection::vec(-2i64..9, 0..9),
            rows in prop::collection::vec(any::<f32>(), 0..50),
            vocabulary in 0usize..7,
            temperature: f64,
            top_k: u64,
            top_p: f64,
            position: u64,
        ) {
            if let Ok(tree) = Tree::new(&tokens, &parents, vocabulary) {
                let warp = Warp { temperature, top_k, top_p };
                let rows: Vec<f32> = rows.iter().copied().cycle().take(tokens.len() * vocabulary).collect();
                if let Ok(verdict) = walk(&tree, &rows, vocabulary, Place { seed: 3, position }, warp, true) {
                    prop_assert_eq!(verdict.tokens.len(), verdict.path.len() + 1);
                }
            }
        }
    }
}
