//! Noise transport records: two bytes of length, ciphertext, tag. Sealed and opened in place.
//!
//! Source: the Noise specification, sections 5.1 and 12.3, and libp2p's specs/noise.

use ring::aead::{Aad, LessSafeKey, Nonce, UnboundKey, CHACHA20_POLY1305, NONCE_LEN};

use super::Error;

pub const LENGTH_BYTES: usize = 2;
pub const TAG_BYTES: usize = 16;
pub const MAX_RECORD_BYTES: usize = u16::MAX as usize;
pub const MAX_PLAINTEXT_BYTES: usize = MAX_RECORD_BYTES - TAG_BYTES;

/// One direction: a key and a counter that never comes back, since 2^64 records can't be sent in a lifetime.
struct Cipher {
    key: LessSafeKey,
    counter: u64,
}

impl Cipher {
    fn new(key: &[u8]) -> Result<Self, Error> {
        let key =
            UnboundKey::new(&CHACHA20_POLY1305, key).map_err(|_| Error::Local("a noise key has 32 bytes"))?;
        Ok(Cipher {
            key: LessSafeKey::new(key),
            counter: 0,
        })
    }

    fn nonce(&self) -> Nonce {
        let mut bytes = [0; NONCE_LEN];
        bytes[4..].copy_from_slice(&self.counter.to_le_bytes());
        Nonce::assume_unique_for_key(bytes)
    }
}

pub struct Sealer(Cipher);

impl Sealer {
    pub fn new(key: &[u8]) -> Result<Self, Error> {
        Cipher::new(key).map(Sealer)
    }

    /// Appends one record whose plaintext `fill` appends, at most MAX_PLAINTEXT_BYTES; nothing when it appends nothing.
    pub fn record(&mut self, output: &mut Vec<u8>, fill: impl FnOnce(&mut Vec<u8>)) -> Result<bool, Error> {
        let start = output.len();
        output.extend_from_slice(&[0; LENGTH_BYTES]);
        let plain = output.len();
        fill(output);
        let size = output.len() - plain;
        if size == 0 {
            output.truncate(start);
            return Ok(false);
        }
        let (Ok(length), Ok(tag)) = (
            u16::try_from(size + TAG_BYTES),
            self.0
                .key
                .seal_in_place_separate_tag(self.0.nonce(), Aad::empty(), &mut output[plain..]),
        ) else {
            return Err(Error::Local("more than a noise record holds"));
        };
        self.0.counter += 1;
        output[start..plain].copy_from_slice(&length.to_be_bytes());
        output.extend_from_slice(tag.as_ref());
        Ok(true)
    }
}

pub struct Opener {
    cipher: Cipher,
    /// The beginning of a record whose rest has not come.
    partial: Vec<u8>,
    room: Vec<u8>,
}

impl Opener {
    pub fn new(key: &[u8]) -> Result<Self, Error> {
        Ok(Opener {
            cipher: Cipher::new(key)?,
            partial: Vec::new(),
            room: Vec::new(),
        })
    }

    /// Hands the plaintext of each record that is whole by now to `take`, until that fails.
    pub fn receive(
        &mut self,
        mut data: &[u8],
        mut take: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        while !data.is_empty() {
            if self.partial.is_empty() {
                match whole_record(data)? {
                    Some(end) => {
                        self.room.clear();
                        self.room.extend_from_slice(&data[LENGTH_BYTES..end]);
                        data = &data[end..];
                        take(open(&mut self.cipher, &mut self.room)?)?;
                    }
                    None => {
                        self.partial.extend_from_slice(data);
                        break;
                    }
                }
                continue;
            }
            let wanted = match *self.partial.as_slice() {
                [high, low, ..] => LENGTH_BYTES + usize::from(u16::from_be_bytes([high, low])),
                _ => LENGTH_BYTES,
            };
            let (more, rest) = data.split_at(data.len().min(wanted - self.partial.len()));
            self.partial.extend_from_slice(more);
            data = rest;
            if whole_record(&self.partial)?.is_some() {
                take(open(&mut self.cipher, &mut self.partial[LENGTH_BYTES..])?)?;
                self.partial.clear();
            }
        }
        self.release_room();
        Ok(())
    }

    /// An idle connection keeps no buffers.
    fn release_room(&mut self) {
        self.room = Vec::new();
        if self.partial.is_empty() {
            self.partial = Vec::new();
        }
    }
}

/// Where the first record of `data` ends, if it is whole.
fn whole_record(data: &[u8]) -> Result<Option<usize>, Error> {
    let [high, low, ..] = *data else {
        return Ok(None);
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length < TAG_BYTES {
        return Err(Error::Remote(format!(
            "a noise record of {length} bytes is shorter than its tag"
        )));
    }
    let end = LENGTH_BYTES + length;
    Ok((end <= data.len()).then_some(end))
}

fn open<'a>(cipher: &mut Cipher, record: &'a mut [u8]) -> Result<&'a [u8], Error> {
    let plain = cipher
        .key
        .open_in_place(cipher.nonce(), Aad::empty(), record)
        .map_err(|_| Error::Remote("a noise record that the other side did not seal".into()))?;
    cipher.counter += 1;
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair() -> (Sealer, Opener) {
        let key = [7; 32];
        (Sealer::new(&key).expect("a key"), Opener::new(&key).expect("a key"))
    }

    fn opened(opener: &mut Opener, data: &[u8]) -> Result<Vec<u8>, Error> {
        let mut plain = Vec::new();
        opener.receive(data, |piece| {
            plain.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(plain)
    }

    proptest! {
        #[test]
        fn what_is_sealed_arrives_whole_however_it_is_cut(
            sizes in prop::collection::vec(prop_oneof![0usize..60, 65_000..=MAX_PLAINTEXT_BYTES], 0..5),
            cuts in prop::collection::vec(1usize..80_000, 1..9),
        ) {
            let (mut sealer, mut opener) = pair();
            let (mut sealed, mut sent, mut got) = (Vec::new(), Vec::new(), Vec::new());
            for (index, size) in sizes.into_iter().enumerate() {
                let piece = vec![index as u8; size];
                let some = sealer.record(&mut sealed, |output| output.extend_from_slice(&piece));
                prop_assert_eq!(some, Ok(size > 0));
                sent.extend_from_slice(&piece);
            }
            let (mut rest, mut cuts) = (sealed.as_slice(), cuts.into_iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(cuts.next().unwrap_or(1)));
                got.extend(opened(&mut opener, now).expect("our own records"));
                rest = later;
            }
            prop_assert_eq!(got, sent);
        }

        #[test]
        fn a_changed_record_is_refused_or_waits_for_more(at in 0usize..100, change in 1u8..) {
            let (mut sealer, mut opener) = pair();
            let mut sealed = Vec::new();
            sealer.record(&mut sealed, |output| output.extend_from_slice(&[5; 82])).expect("fits");
            sealed[at] ^= change;
            if let Ok(plain) = opened(&mut opener, &sealed) {
                prop_assert!(plain.is_empty() && at < LENGTH_BYTES);
            }
        }

        #[test]
        fn random_bytes_do_not_panic_and_hold_less_than_a_record(data in prop::collection::vec(any::<u8>(), 0..400)) {
            let (_, mut opener) = pair();
            let _ = opened(&mut opener, &data);
            prop_assert!(opener.partial.len() < LENGTH_BYTES + MAX_RECORD_BYTES);
        }
    }

    #[test]
    fn a_repeated_record_is_refused() {
        let (mut sealer, mut opener) = pair();
        let mut sealed = Vec::new();
        sealer.record(&mut sealed, |output| output.push(1)).expect("fits");
        assert_eq!(opened(&mut opener, &sealed), Ok(vec![1]));
        assert!(opened(&mut opener, &sealed).is_err());
    }

    #[test]
    fn more_than_a_record_is_our_own_fault() {
        let (mut sealer, _) = pair();
        let much = vec![0; MAX_PLAINTEXT_BYTES + 1];
        assert!(sealer
            .record(&mut Vec::new(), |output| output.extend_from_slice(&much))
            .is_err());
    }
}
