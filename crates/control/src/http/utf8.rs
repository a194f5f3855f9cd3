//! Bytes that come in pieces, as text: a character on the edge of two pieces is kept whole.

/// Turns one stream of bytes into text.
#[derive(Debug, Default)]
pub struct Decoder {
    /// The beginning of a character: at most three bytes.
    begun: Vec<u8>,
}

impl Decoder {
    /// The text up to the last whole character. What is not UTF-8 becomes U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        let joined;
        let mut rest = if self.begun.is_empty() {
            bytes
        } else {
            joined = [std::mem::take(&mut self.begun).as_slice(), bytes].concat();
            &joined
        };
        let mut text = String::with_capacity(rest.len());
        loop {
            let error = match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    return text;
                }
                Err(error) => error,
            };
            let (valid, broken) = rest.split_at(error.valid_up_to());
            // It was just found to be so.
            text.push_str(&String::from_utf8_lossy(valid));
            match error.error_len() {
                Some(length) => {
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &broken[length..];
                }
                None => {
                    self.begun = broken.to_vec();
                    return text;
                }
            }
        }
    }

    /// What is left when no more comes.
    pub fn finish(&mut self) -> String {
        let begun = std::mem::take(&mut self.begun);
        if begun.is_empty() { String::new() } else { char::REPLACEMENT_CHARACTER.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_pieces(bytes: &[u8], size: usize) -> String {
        let mut decoder = Decoder::default();
        let mut text: String = bytes.chunks(size).map(|piece| decoder.push(piece)).collect();
        text.push_str(&decoder.finish());
        text
    }

    #[test]
    fn wherever_it_is_cut_the_text_is_the_same() {
        let cases: [&[u8]; 7] = [
            "aé漢🦀z".as_bytes(),
            b"",
            b"\xff\xfe",
            b"a\xe2\x82",
            b"a\xe2\x82b\xf0\x9f\xa6",
            b"\xc3(\xa0\xa1\xe2(\xa1",
            b"\xed\xa0\x80\xf4\x90\x80\x80\xc0\x80",
        ];
        for bytes in cases {
            for size in 1..=bytes.len().max(1) {
                assert_eq!(in_pieces(bytes, size), String::from_utf8_lossy(bytes), "{bytes:?} by {size}");
            }
        }
    }

    #[test]
    fn a_cut_character_is_one_replacement() {
        let mut bytes = vec![b'a'; 8191];
        bytes.push(0xe2);
        assert_eq!(in_pieces(&bytes, 8192), format!("{}\u{fffd}", "a".repeat(8191)));
    }
}
