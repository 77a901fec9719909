//! How far a sender may run ahead of its reader. `lattica/net/windows.py` is the reference and says why.

use std::sync::atomic::{AtomicU64, Ordering};

pub const INITIAL_WINDOW: u64 = 256 * 1024;
pub const MAX_WINDOW: u64 = 16 * 1024 * 1024;
/// Growth of all windows of one connection together.
pub const EXTRA_WINDOWS: u64 = 64 * 1024 * 1024;
const GROW_WITHIN_ROUND_TRIPS: f64 = 2.0;
/// Up to here a window grows whenever its reader keeps up.
const EASY_WINDOW: u64 = 1024 * 1024;
/// Seconds.
const MIN_ROUND_TRIP: f64 = 0.0005;

/// Growth of windows beyond their first size, for all connections that share this.
#[derive(Debug)]
pub struct Budget {
    pub limit: u64,
    used: AtomicU64,
}

impl Budget {
    pub fn new(limit: u64) -> Self {
        Budget {
            limit,
            used: AtomicU64::new(0),
        }
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// As much of `size` as is left.
    pub fn take(&self, size: u64) -> u64 {
        let mut taken = 0;
        let _ = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            taken = size.min(self.limit.saturating_sub(used));
            Some(used + taken)
        });
        taken
    }

    pub fn give_back(&self, size: u64) {
        self.used.fetch_sub(size, Ordering::Relaxed);
    }
}

/// What the other side may send on one stream.
#[derive(Debug)]
pub struct ReceiveWindow {
    /// What `left` and the unread bytes add up to after a credit.
    pub size: u64,
    /// What the other side may still send.
    pub left: u64,
    /// When growth was last considered, in seconds.
    epoch: f64,
    /// Credited since then, and whether the reader once had nothing to read since then.
    used: u64,
    drained: bool,
}

impl ReceiveWindow {
    pub fn new(now: f64) -> Self {
        ReceiveWindow {
            size: INITIAL_WINDOW,
            left: INITIAL_WINDOW,
            epoch: now,
            used: 0,
            drained: false,
        }
    }

    /// What to grant after a read that left `unread` bytes: nothing until half the window was used.
    pub fn credit(&mut self, unread: u64) -> u64 {
        self.drained |= unread == 0;
        let credit = self.size.saturating_sub(self.left + unread);
        if credit * 2 < self.size {
            return 0;
        }
        self.left += credit;
        self.used += credit;
        credit
    }

    /// Whether to grow, asked whenever data arrives; `rtt` is the shortest seen.
    pub fn wants_growth(&mut self, now: f64, rtt: Option<f64>) -> bool {
        if self.used == 0 {
            return false;
        }
        let (elapsed, used, drained) = (now - self.epoch, self.used as f64, self.drained);
        (self.epoch, self.used, self.drained) = (now, 0, false);
        match rtt {
            Some(rtt) if self.size >= EASY_WINDOW => {
                let allowed = GROW_WITHIN_ROUND_TRIPS * rtt.max(MIN_ROUND_TRIP);
                drained && elapsed * self.size as f64 <= allowed * used
            }
            _ => drained,
        }
    }

    pub fn grow(&mut self, size: u64) {
        self.size += size;
        self.left += size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_granted_never_exceeds_the_window(
            steps in prop::collection::vec((0u64..600_000, 0u64..600_000, 0.0f64..0.1), 1..60),
            rtt in prop::option::of(0.0f64..0.2),
        ) {
            let (mut window, mut unread, mut now) = (ReceiveWindow::new(0.0), 0, 0.0);
            for (arrives, reads, later) in steps {
                now += later;
                let arrives = arrives.min(window.left);
                window.left -= arrives;
                unread += arrives;
                if arrives > 0 && window.wants_growth(now, rtt) && window.size < MAX_WINDOW {
                    window.grow(window.size);
                }
                let reads = reads.min(unread);
                unread -= reads;
                if reads > 0 {
                    window.credit(unread);
                }
                prop_assert!(window.left + unread <= window.size);
                prop_assert!(window.left + unread > 0 || reads == 0);
            }
        }

        #[test]
        fn a_budget_is_never_overdrawn(limit in 0u64..1000, sizes in prop::collection::vec(0u64..400, 0..20)) {
            let budget = Budget::new(limit);
            let taken: Vec<u64> = sizes.iter().map(|size| budget.take(*size)).collect();
            prop_assert_eq!(budget.used(), taken.iter().sum::<u64>());
            prop_assert!(budget.used() <= limit);
            taken.iter().for_each(|size| budget.give_back(*size));
            prop_assert_eq!(budget.used(), 0);
        }
    }

    #[test]
    fn an_easy_window_grows_and_a_larger_one_only_when_it_is_used_up_within_two_round_trips() {
        for (size, seconds, grows) in [
            (INITIAL_WINDOW, 10.0, true),
            (EASY_WINDOW, 0.19, true),
            (EASY_WINDOW, 0.21, false),
        ] {
            let mut window = ReceiveWindow::new(0.0);
            (window.size, window.left) = (size, 0);
            assert_eq!(window.credit(0), size);
            assert_eq!(window.wants_growth(seconds, Some(0.1)), grows);
        }
    }
}
