//! Podgate on Linux: the devices, the memory and the threads around the pipeline of `podgate-core`.
//!
//! All `unsafe` of the project is in this crate, in the modules that speak to the kernel, behind small safe types.

pub mod flow_file;
mod link;
pub mod netns;
pub mod sockets;
mod sys;
pub mod tun;
pub mod udp;
pub mod vnet;
