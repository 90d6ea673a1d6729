//! Fragments: the rest of a datagram follows its head, and a packet too long for its path is cut.
//!
//! Only a datagram's first fragment says its ports. [`FragmentTable`] remembers what became of it so that the others, which are named by
//! addresses, protocol and identification alone, go the same way; the gateway never puts datagrams together. [`cut()`] makes fragments
//! where the path takes less than the packet's sender thought and the packet allows it.
//!
//! Read first: RFC 791 §3.2, RFC 8200 §4.5, RFC 5722 (overlaps), RFC 4963 and RFC 6864 (why identifications repeat).

mod cut;
mod slab;
mod spans;
mod table;

pub use cut::cut;
pub use slab::Held;
pub use table::{FragmentKey, FragmentLimits, FragmentTable, Lost, Tail};

#[cfg(test)]
mod tests;
