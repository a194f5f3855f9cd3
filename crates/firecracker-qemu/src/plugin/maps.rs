//! Finding guest memory among this process's mappings.

/// One mapping of guest memory.
#[derive(Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Address of the first byte.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// Offset of the first byte in guest memory.
    pub offset: u64,
}

/// The mappings of the memfd called `name` in the text of `/proc/self/maps`, in order of their offsets.
pub fn find(maps: &str, name: &str) -> Vec<Mapping> {
    let path = format!("/memfd:{name} (deleted)");
    let mut found: Vec<Mapping> = maps.lines().filter_map(|line| line.strip_suffix(&path)).filter_map(parse).collect();
    found.sort_by_key(|mapping| mapping.offset);
    found
}

fn parse(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let (start, end) = (hex(start)?, hex(end)?);
    let offset = hex(fields.nth(1)?)?;
    Some(Mapping { start, size: end.checked_sub(start)?, offset })
}

fn hex(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits, 16).ok()
}
