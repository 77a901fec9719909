//! A queue of bytes that is read from the front in one piece.

/// An empty or nearly empty queue keeps no more room than this: thousands of streams rest between two calls.
const KEPT_BYTES: usize = 4 * 1024;

/// Bytes that can be appended to a queue: a slice, or memory of another language that only lets itself be copied.
pub trait Source {
    fn len(&self) -> usize;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends the first `size` bytes, or all when there are fewer.
    fn append_to(&self, size: usize, target: &mut Vec<u8>);
}

impl Source for &[u8] {
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    fn append_to(&self, size: usize, target: &mut Vec<u8>) {
        target.extend_from_slice(&self[..size.min(self.len())]);
    }
}

/// What was read stays in front of `head` until it pays to move the rest down.
#[derive(Debug, Default)]
pub struct ByteQueue {
    bytes: Vec<u8>,
    head: usize,
}

impl ByteQueue {
    pub fn len(&self) -> usize {
        self.bytes.len() - self.head
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first `size` bytes, or all when there are fewer.
    pub fn front(&self, size: usize) -> &[u8] {
        &self.bytes[self.head..][..size.min(self.len())]
    }

    pub fn push(&mut self, source: &impl Source, size: usize) {
        if self.head > 0 && self.bytes.len() + size > self.bytes.capacity() && self.head >= self.len() {
            self.bytes.drain(..self.head);
            self.head = 0;
        }
        source.append_to(size, &mut self.bytes);
    }

    /// Drops the first `size` bytes, or all when there are fewer.
    pub fn skip(&mut self, size: usize) {
        self.head += size.min(self.len());
        let left = self.len();
        if left == 0 {
            self.head = 0;
            if self.bytes.capacity() > KEPT_BYTES {
                self.bytes = Vec::new();
            } else {
                self.bytes.clear();
            }
        } else if left * 4 < self.bytes.capacity() && self.bytes.capacity() > 16 * KEPT_BYTES {
            self.bytes = self.front(left).to_vec();
            self.head = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_gives_back_what_was_put_in_and_keeps_little_more(
            steps in prop::collection::vec((prop::bool::ANY, 0usize..300_000), 1..40),
        ) {
            let (mut queue, mut model) = (ByteQueue::default(), Vec::new());
            for (index, (push, size)) in steps.into_iter().enumerate() {
                if push {
                    let piece = vec![index as u8; size];
                    queue.push(&piece.as_slice(), size);
                    model.extend_from_slice(&piece);
                } else {
                    prop_assert_eq!(queue.front(size), &model[..size.min(model.len())]);
                    queue.skip(size);
                    model.drain(..size.min(model.len()));
                    let held = queue.bytes.capacity();
                    prop_assert!(held <= 16 * KEPT_BYTES || held <= 4 * queue.len());
                }
                prop_assert_eq!(queue.len(), model.len());
            }
            prop_assert_eq!(queue.front(usize::MAX), model.as_slice());
        }
    }
}
