//! Netlink attributes: the type, length and value of which most messages are made, written and read.

use std::net::Ipv4Addr;

const HEADER: usize = 4;
/// The flags above an attribute's type: nested, and big-endian.
const TYPE_MASK: u16 = 0x3FFF;

/// Where attributes are appended.
pub(crate) struct Attributes<'a>(pub(crate) &'a mut Vec<u8>);

impl Attributes<'_> {
    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |bytes| bytes.extend(value));
    }

    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        self.attribute(kind, |bytes| {
            bytes.extend(value.as_bytes());
            bytes.push(0);
        });
    }

    /// Big-endian, as all of netfilter's numbers are.
    pub(crate) fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// Big-endian.
    pub(crate) fn long(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(crate) fn nest(&mut self, kind: u16, write: impl FnOnce(&mut Attributes<'_>)) {
        self.attribute(kind | libc::NLA_F_NESTED as u16, |bytes| write(&mut Attributes(bytes)));
    }

    fn attribute(&mut self, kind: u16, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        write(self.0);
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// Attributes as the kernel sent them, by type.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    /// Every attribute, in order; what is cut off at the end is left out.
    pub(crate) fn all(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let length = u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?) as usize;
            let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & TYPE_MASK;
            let value = rest.get(HEADER..length)?;
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
            Some((kind, value))
        })
    }

    /// The first attribute of that type.
    pub(crate) fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.all().find_map(|(found, value)| (found == kind).then_some(value))
    }

    /// What is nested in the first attribute of that type.
    pub(crate) fn nested(self, kind: u16) -> Option<Reader<'a>> {
        self.get(kind).map(Reader)
    }

    /// A big-endian number of 64 bits.
    pub(crate) fn long(self, kind: u16) -> Option<u64> {
        self.get(kind)?.try_into().ok().map(u64::from_be_bytes)
    }

    pub(crate) fn address(self, kind: u16) -> Option<Ipv4Addr> {
        let octets: [u8; 4] = self.get(kind)?.try_into().ok()?;
        Some(octets.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let mut bytes = Vec::new();
        let mut attributes = Attributes(&mut bytes);
        attributes.text(1, "odd");
        attributes.nest(2, |inner| {
            inner.long(3, 1 << 40);
            inner.bytes(4, &[10, 11, 0, 1]);
        });
        let all = Reader(&bytes);
        assert_eq!(all.get(1), Some(&b"odd\0"[..]));
        let inner = all.nested(2).unwrap();
        assert_eq!((inner.long(3), inner.address(4)), (Some(1 << 40), Some(Ipv4Addr::new(10, 11, 0, 1))));
        assert_eq!((all.get(9), inner.long(4)), (None, None));
    }

    #[test]
    fn lengths_that_lie_end_the_list() {
        for bytes in [&[0, 0, 1, 0][..], &[3, 0, 1, 0], &[200, 0, 1, 0, 1, 2, 3, 4], &[8, 0, 1]] {
            assert_eq!(Reader(bytes).all().count(), 0, "{bytes:?}");
        }
    }
}
