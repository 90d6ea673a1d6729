//! Podgate's control side: from a configuration and the cluster's objects to the tables that the workers read, and to the rules and
//! routes that bring packets to them.
//!
//! In the order in which a change passes: [`source`] watches the cluster's objects, [`model`] holds what of them matters, [`compile`]
//! makes a snapshot of it for this node, [`daemon`] publishes it. [`pods`] attaches, with addresses from [`ipam`], out of
//! [`blocks`] of the cluster's ranges where nodes share them; [`routing`] brings
//! packets to the workers, by [`netlink`]; [`selftest`] proves that they come. [`api`] and [`cli`] are the operator's side, [`diff`] what
//! they are told of changes, [`doctor`] what is wrong with a machine; [`health`] and [`metrics`] are told over HTTP.
//! [`publish`] makes endpoints of what runs on the node itself. [`keeper`] keeps what a successor goes on with.
//!
//! ```
//! let text = "underlay: {address: 192.0.2.1}\nsource: {directory: /etc/podgate/cluster.d}\n";
//! let host = podgate::config::HostFacts { name: "node-1".into(), ephemeral_ports: 32768..=60999 };
//! let config = podgate::config::Config::parse("podgate.yaml".as_ref(), text, &host)?;
//! assert_eq!(config.pod_cidrs[0].to_string(), "10.32.0.0/12");
//! # Ok::<(), podgate::config::ConfigError>(())
//! ```
#![forbid(unsafe_code)]

pub mod config;
pub mod source;
pub mod model;
pub mod compile;
pub mod daemon;
pub mod pods;
pub mod privileges;
pub mod ipam;
pub mod blocks;
pub mod install_cni;
pub mod logging;
pub mod notify;
pub mod keeper;
pub mod gateway_ns;
pub mod routing;
pub mod guard_drops;
pub mod netlink;
pub mod host_state;
pub mod selftest;
pub mod health;
pub mod publish;
pub mod metrics;
pub mod diff;
pub mod api;
pub mod doctor;
pub mod cli;
pub mod lab;
pub mod demo;
