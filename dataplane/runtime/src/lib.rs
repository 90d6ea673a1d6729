//! Podgate on Linux: the devices, the memory and the threads around the pipeline of `podgate-core`.
//!
//! All `unsafe` of the project is in this crate, in the modules that speak to the kernel, behind small safe types.
//!
//! The devices, each usable alone:
//!
//! | module | what |
//! |---|---|
//! | [`netns`] | network namespaces as values |
//! | [`tun`] | multi-queue TUN devices with offloads; [`vnet`] is the header before each frame |
//! | [`pod_tun`] | TUNs inside pods' own namespaces |
//! | [`udp`] | the overlay's sockets, superframes both ways |
//! | [`sockets`] | reassembled datagrams and ICMP, which no port rule can bring |
//! | [`flow_file`] | the memory of the flow table, which outlives the process |
//! | [`handed`] | descriptors that a process is started with |
//!
//! The threads, and what moves packets between the devices and the pipeline:
//!
//! | module | what |
//! |---|---|
//! | [`runtime`] | start it, publish snapshots to it, read its counters, stop it |
//! | [`worker`] | a batch's way from its read to its last write |
//! | [`publish`] | snapshots, swapped under the workers' feet |
//! | [`netstack`] | what answers on the gateway addresses |
//! | [`clock`] | the time, read once for each batch |
//!
//! A frame from the gateway's namespace, and the same frame written back as if the gateway had nothing to say:
//!
//! ```no_run
//! use std::io::IoSlice;
//!
//! use podgate_core::packet::{Ingress, Packet};
//! use podgate_core::parse::parse;
//! use podgate_runtime::netns::Netns;
//! use podgate_runtime::tun::Tun;
//! use podgate_runtime::vnet::{VNET_HEADER_LEN, VnetHeader};
//!
//! let netns = Netns::open("/run/podgate/netns")?;
//! let mut pods = Tun::open("pods", 2, &netns)?;
//! pods.set_mtu(65_535)?;
//! pods.bring_up()?;
//!
//! let mut buffer = vec![0; 65_536];
//! for queue in &pods.queues {
//!     while let Some((len, offload)) = queue.read(&mut buffer)? {
//!         let packet = Packet { head: &mut buffer[VNET_HEADER_LEN..][..len], tail_len: 0, offload, ingress: Ingress::Pods };
//!         if let Ok(parsed) = parse(&packet) {
//!             queue.write(&VnetHeader::of(offload, &parsed), &[IoSlice::new(packet.head)])?;
//!         }
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod clock;
mod dhcp;
pub mod ethtool;
pub mod flow_file;
pub mod handed;
mod huge_pages;
mod link;
pub mod netns;
pub mod netstack;
mod ports;
pub mod pod_tun;
pub mod publish;
pub mod runtime;
pub mod sockets;
mod sys;
#[cfg(test)]
mod testing;
pub mod tun;
pub mod udp;
pub mod vnet;
pub mod worker;
