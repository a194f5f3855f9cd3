//! The filter through which a capsule reaches names: whoever has a list of domains sends its TCP connections and its DNS
//! questions here, by rules of its network namespace, and nothing of it goes anywhere else.
//!
//! ```text
//!   guest ── question ──► dns ── allowed name ──► the host's resolver
//!                          │ answers: this name has these addresses, for so long
//!   guest ── connection ─► head: TLS server name or HTTP Host
//!                          │ allowed, and the address is one that was answered for it?
//!                          └──► connection from the capsule's own namespace, spliced
//! ```
//!
//! What guests write is parsed here and nowhere else of the agent: [`head`] and [`dns`] are pure, bounded and fuzzed.
//! A [`Filter`] is one thread in one capsule's namespace, so that it reaches only what the firewall lets that capsule reach,
//! and a flood of one capsule is that capsule's. What it cannot tell is refused: a connection without a name, with two, with
//! one that is encrypted (ECH), a Host in the request line, a question for another name or for what could carry data out.
//!
//! What it cannot know is what a server that may be reached does for other names: whoever needs to shut that out must not
//! allow names that are served by machines shared with strangers.

pub mod answers;
pub mod dns;
mod filter;
pub mod head;
mod resolver;

pub use filter::{DNS_PORT, Error, Filter, TCP_PORT};
pub use resolver::Resolver;
