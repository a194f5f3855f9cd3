//! gzip, both ways, in steps that are each short and small.

use super::{Error, blocking};
use bytes::{Buf, Bytes};
use flate2::Compression;
use flate2::write::{GzEncoder, MultiGzDecoder};
use futures::{Stream, StreamExt};
use std::io::{self, Write};

/// About how many bytes one step gives.
const STEP: usize = 256 << 10;

/// How much is unpacked between two looks at how much came of it: a byte may become a thousand.
const SIP: usize = 1 << 10;

/// What a packed body holds. All of it must be there, and nothing else.
pub fn unpacked<'a>(
    packed: impl Stream<Item = Result<Bytes, Error>> + Unpin + Send + 'a,
) -> impl Stream<Item = Result<Bytes, Error>> + Send + 'a {
    let start = (packed, Some(Unpack { decoder: MultiGzDecoder::new(Vec::new()), input: Bytes::new() }));
    futures::stream::try_unfold(start, async |(mut packed, unpack)| {
        let Some(mut unpack) = unpack else { return Ok(None) };
        loop {
            if unpack.input.is_empty() {
                match packed.next().await {
                    Some(input) => unpack.input = input?,
                    None => {
                        let last = blocking(move || unpack.finish()).await.map_err(Error::Gzip)?;
                        return Ok(Some((last, (packed, None))));
                    }
                }
            }
            let (output, rest) = blocking(move || (unpack.step(), unpack)).await;
            unpack = rest;
            match output.map_err(Error::Gzip)? {
                output if output.is_empty() => {}
                output => return Ok(Some((output, (packed, Some(unpack))))),
            }
        }
    })
}

struct Unpack {
    decoder: MultiGzDecoder<Vec<u8>>,
    input: Bytes,
}

impl Unpack {
    fn step(&mut self) -> io::Result<Bytes> {
        while !self.input.is_empty() && self.decoder.get_ref().len() < STEP {
            let sip = self.input.len().min(SIP);
            self.decoder.write_all(&self.input[..sip])?;
            self.input.advance(sip);
        }
        Ok(std::mem::take(self.decoder.get_mut()).into())
    }

    fn finish(mut self) -> io::Result<Bytes> {
        self.decoder.try_finish()?;
        Ok(std::mem::take(self.decoder.get_mut()).into())
    }
}

/// Packs what is given in pieces.
pub struct Pack(GzEncoder<Vec<u8>>);

impl Pack {
    pub fn new() -> Pack {
        // The client is one hop from the host: more effort would cost a slow guest more than it saves.
        Pack(GzEncoder::new(Vec::new(), Compression::fast()))
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    /// What is packed so far, once it is enough to send.
    pub fn take(&mut self) -> Option<Bytes> {
        (self.0.get_ref().len() >= STEP).then(|| std::mem::take(self.0.get_mut()).into())
    }

    pub fn finish(self) -> io::Result<Bytes> {
        Ok(self.0.finish()?.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut pack = Pack::new();
        let mut out = Vec::new();
        for piece in bytes.chunks(100_000) {
            pack.write(piece).unwrap();
            out.extend(pack.take().unwrap_or_default());
        }
        out.extend(pack.finish().unwrap());
        out
    }

    async fn unpack(packed: &[u8], piece: usize) -> Result<(Vec<u8>, usize), Error> {
        let pieces: Vec<_> = packed.chunks(piece.max(1)).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let mut stream = std::pin::pin!(unpacked(futures::stream::iter(pieces)));
        let (mut all, mut largest) = (Vec::new(), 0);
        while let Some(next) = stream.next().await {
            let next = next?;
            largest = largest.max(next.len());
            all.extend(next);
        }
        Ok((all, largest))
    }

    #[tokio::test]
    async fn what_was_packed_comes_out() {
        let text: Vec<u8> = (0..700_000_u32).flat_map(|number| number.wrapping_mul(number).to_le_bytes()).collect();
        for (contents, piece) in [(&b""[..], 7), (b"x", 1), (&text, 1000), (&text, 1 << 20)] {
            assert!(unpack(&packed(contents), piece).await.unwrap().0 == contents);
        }
        let twice = [packed(b"one, "), packed(b"two")].concat();
        assert_eq!(unpack(&twice, 3).await.unwrap().0, b"one, two");
    }

    #[tokio::test]
    async fn a_bomb_goes_off_slowly() {
        let (all, largest) = unpack(&packed(&vec![0; 4 << 20]), 1 << 20).await.unwrap();
        assert_eq!(all.len(), 4 << 20);
        assert!(largest < STEP + 1100 * SIP, "{largest}");
    }

    #[tokio::test]
    async fn half_and_foreign_data_is_refused() {
        let whole = packed(b"some text");
        let mut broken = whole.clone();
        let end = broken.len() - 6;
        broken[end] ^= 1;
        for bad in
            [&b""[..], b"plain text", &whole[..whole.len() - 1], &whole[..4], &broken, &[&whole[..], b"x"].concat()]
        {
            assert!(matches!(unpack(bad, 5).await, Err(Error::Gzip(_))), "{bad:?}");
        }
    }
}
