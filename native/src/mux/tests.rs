//! Two machines that talk to each other, and one that hears anything.

use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::frame::{Header, Kind, SYN};
use super::*;

fn pair(windows: &Arc<Budget>) -> [Mux; 2] {
    let keys = [[7; 32], [8; 32]];
    [0, 1].map(|side| {
        let mut mux =
            Mux::new(side == 0, &keys[side], &keys[1 - side], Arc::clone(windows)).expect("keys of 32 bytes");
        mux.start(&[]).expect("not started before");
        mux
    })
}

/// What is counted is what there is.
fn check(yamux: &Yamux) {
    let sum = |count: fn(&stream::Stream) -> usize| yamux.streams.values().map(count).sum::<usize>();
    assert_eq!(yamux.unread_bytes, sum(|stream| stream.unread.len()));
    assert_eq!(yamux.output.queued, sum(|stream| stream.queued.len()));
    assert_eq!(yamux.output.senders, sum(|stream| usize::from(stream.waiting)));
    for stream in yamux.streams.values() {
        assert!(stream.window.left + stream.unread.len() as u64 <= stream.window.size);
        assert!(stream.waiting == (!stream.queued.is_empty() || stream.ending && !stream.ended_here));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Open,
    Send(usize),
    End,
    Reset,
    Discard,
    Read(usize),
    Ping,
    /// Bytes that the other side gets.
    Move(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        Just(Step::Open),
        (1usize..400_000).prop_map(Step::Send),
        (1usize..400_000).prop_map(Step::Send),
        Just(Step::End),
        Just(Step::Reset),
        Just(Step::Discard),
        (1usize..400_000).prop_map(Step::Read),
        Just(Step::Ping),
        (1usize..200_000).prop_map(Step::Move),
        Just(Step::Move(usize::MAX)),
    ]
}

fn frame() -> impl Strategy<Value = Vec<u8>> {
    let kinds = [Kind::Data, Kind::WindowUpdate, Kind::Ping, Kind::GoAway];
    let length = prop_oneof![0u32..20, any::<u32>()];
    (0usize..4, 0u16..16, 0u32..7, length)
        .prop_map(move |(kind, flags, id, length)| Header::new(kinds[kind], flags, id, length).encode().to_vec())
}

proptest! {
    #[test]
    fn two_sides_never_break_each_other_and_lose_nothing(
        steps in prop::collection::vec((0usize..2, 0usize..5, step()), 0..80),
    ) {
        let windows = Arc::new(Budget::new(1 << 20));
        let mut sides = pair(&windows);
        let mut wires = [Vec::new(), Vec::new()]; // by who hears it
        let mut sent: HashMap<(usize, u32), Vec<u8>> = HashMap::new(); // by who hears it
        let mut got: HashMap<(usize, u32), Vec<u8>> = HashMap::new();
        let mut known = Vec::new();
        for (index, (side, which, step)) in steps.into_iter().enumerate() {
            let mux = &mut sides[side];
            let id = if known.is_empty() { 1 } else { known[which % known.len()] };
            match step {
                Step::Open => known.push(mux.yamux.open().expect("nobody went away")),
                Step::Send(size) => {
                    let data = vec![index as u8; size];
                    if let Ok(taken) = mux.yamux.send(id, &data.as_slice()) {
                        sent.entry((1 - side, id)).or_default().extend_from_slice(&data[..taken]);
                    }
                }
                Step::End => drop(mux.yamux.end(id)),
                Step::Reset => mux.yamux.reset(id),
                Step::Discard => mux.yamux.discard(id),
                Step::Read(size) => {
                    let data = mux.yamux.read(id, size, <[u8]>::to_vec);
                    got.entry((side, id)).or_default().extend(data);
                }
                Step::Ping => mux.yamux.ping(index as f64),
                Step::Move(size) => {
                    mux.take_output(size, &mut wires[1 - side]).expect("room for every frame");
                    let cut = wires[1 - side].len().min(size);
                    let now: Vec<u8> = wires[1 - side].drain(..cut).collect();
                    sides[1 - side].receive(&now, index as f64).expect("our own frames");
                }
            }
            sides.iter().for_each(|mux| check(&mux.yamux));
            prop_assert!(windows.used() <= 1 << 20);
        }
        for (place, data) in got {
            prop_assert!(data.is_empty() || sent[&place].starts_with(&data));
        }
        drop(sides);
        prop_assert_eq!(windows.used(), 0);
    }

    #[test]
    fn likely_frames_in_any_order_break_nothing_here(
        frames in prop::collection::vec(prop_oneof![frame(), prop::collection::vec(any::<u8>(), 0..20)], 0..40),
        cut in 1usize..40,
    ) {
        let [mut mux, _] = pair(&Arc::new(Budget::new(1 << 20)));
        mux.yamux.open().expect("nobody went away");
        let mut events = Vec::new();
        for piece in frames.concat().chunks(cut) {
            if mux.yamux.receive(piece, 0.0, &mut events).is_err() {
                break;
            }
            check(&mux.yamux);
            for event in events.drain(..) {
                if let Event::Readable(id) = event {
                    mux.yamux.read(id, 7, |_| ());
                }
            }
        }
        mux.take_output(usize::MAX, &mut Vec::new()).expect("room for every frame");
        check(&mux.yamux);
    }
}

#[test]
fn a_stream_that_was_reset_in_the_middle_of_a_frame_does_not_come_back() {
    let [mut mux, _] = pair(&Arc::new(Budget::new(0)));
    let mut events = Vec::new();
    let header = Header::new(Kind::Data, SYN, 2, 4).encode();
    mux.yamux
        .receive(&[&header[..], b"ab"].concat(), 0.0, &mut events)
        .expect("a frame");
    mux.yamux.reset(2);
    mux.yamux.receive(b"cd", 0.0, &mut events).expect("its rest");
    assert_eq!(events, [Event::Opened(2), Event::Readable(2)]);
    assert_eq!(mux.yamux.unread_bytes, 0);
}
