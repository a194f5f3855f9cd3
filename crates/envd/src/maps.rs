//! What is mapped into envd's own memory.

use std::io;

/// A line of `/proc/self/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub start: usize,
    pub end: usize,
    /// Private memory that can be written, of no file.
    pub is_own: bool,
    /// The file, or what the kernel calls it; empty for memory without a name.
    pub name: String,
}

/// All of them.
pub fn mappings() -> io::Result<Vec<Mapping>> {
    Ok(std::fs::read_to_string("/proc/self/maps")?.lines().filter_map(Mapping::read).collect())
}

impl Mapping {
    /// `start-end permissions offset device inode`, and the name after spaces.
    fn read(line: &str) -> Option<Mapping> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let is_writable = fields.next()?.starts_with("rw-p");
        let name = fields.nth(3).unwrap_or_default().trim_start();
        let number = |text| usize::from_str_radix(text, 16).ok();
        let is_own = is_writable && (name.is_empty() || name == "[heap]");
        Some(Mapping { start: number(start)?, end: number(end)?, is_own, name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let of = |line| Mapping::read(line).map(|mapping| (mapping.start, mapping.end, mapping.is_own, mapping.name));
        let own = |name: &str| Some((0x1000, 0x2000, true, name.to_owned()));
        assert_eq!(of("1000-2000 rw-p 00000000 00:00 0 "), own(""));
        assert_eq!(of("1000-2000 rw-p 00000000 00:00 0                          [heap]"), own("[heap]"));
        for (line, name) in [
            ("1000-2000 r--p 00000000 00:00 0", ""),
            ("1000-2000 rw-p 00000000 00:00 0    [stack]", "[stack]"),
            ("1000-2000 rw-p 00000000 08:01 9    /a file", "/a file"),
            ("1000-2000 r-xp 00001000 08:01 42   /usr/local/bin/envd", "/usr/local/bin/envd"),
        ] {
            assert_eq!(of(line), Some((0x1000, 0x2000, false, name.to_owned())), "{line}");
        }
        assert_eq!((of(""), of("x")), (None, None));
        assert!(mappings().unwrap().iter().any(|mapping| mapping.is_own));
    }
}
