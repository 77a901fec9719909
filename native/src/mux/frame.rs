//! Yamux headers. Source: <https://github.com/hashicorp/yamux/blob/master/spec.md>.

pub const HEADER_BYTES: usize = 12;

pub const SYN: u16 = 1;
pub const ACK: u16 = 2;
pub const FIN: u16 = 4;
pub const RST: u16 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Data = 0,
    WindowUpdate = 1,
    Ping = 2,
    GoAway = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub flags: u16,
    pub stream: u32,
    /// Of a DATA frame's payload; credit, opaque value or code of the others.
    pub length: u32,
}

impl Header {
    pub fn new(kind: Kind, flags: u16, stream: u32, length: u32) -> Self {
        Header {
            kind,
            flags,
            stream,
            length,
        }
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[1] = self.kind as u8;
        bytes[2..4].copy_from_slice(&self.flags.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.stream.to_be_bytes());
        bytes[8..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Version, type and flags that are none come back as they are.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, (u8, u8, u16)> {
        let [version, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = *bytes;
        let flags = u16::from_be_bytes([f0, f1]);
        let known = match (version, kind) {
            (0, 0) => Some(Kind::Data),
            (0, 1) => Some(Kind::WindowUpdate),
            (0, 2) => Some(Kind::Ping),
            (0, 3) => Some(Kind::GoAway),
            _ => None,
        };
        match known {
            Some(kind) if flags <= SYN | ACK | FIN | RST => Ok(Header {
                kind,
                flags,
                stream: u32::from_be_bytes([s0, s1, s2, s3]),
                length: u32::from_be_bytes([l0, l1, l2, l3]),
            }),
            _ => Err((version, kind, flags)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_decodes_encodes_to_the_same_bytes(bytes: [u8; HEADER_BYTES]) {
            match Header::decode(&bytes) {
                Ok(header) => prop_assert_eq!(header.encode(), bytes),
                Err((version, kind, flags)) => prop_assert!(version > 0 || kind > 3 || flags > 15),
            }
        }

        #[test]
        fn every_header_comes_back(kind in 0usize..4, flags in 0u16..16, stream: u32, length: u32) {
            let kind = [Kind::Data, Kind::WindowUpdate, Kind::Ping, Kind::GoAway][kind];
            let header = Header::new(kind, flags, stream, length);
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }
}
