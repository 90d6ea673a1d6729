//! What carries the packets, by name.

use podgate_testbed::need::program;

use super::workload::Group;

/// Where the two ends of a workload are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On one node.
    SameNode,
    /// On two.
    BetweenNodes,
}

/// A subject of measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// Podgate, on two nodes.
    Podgate,
    /// Podgate, with pods in mode tun.
    PodgateTun,
    /// Podgate over [`Uplink::Segmented`].
    PodgateSegmented,
    /// Podgate over [`Uplink::Card`].
    PodgateCard,
    /// The kernel: veth and bridge.
    Bridge,
    /// veth, policy routing and a TUN, with no logic behind it.
    Reflector,
    /// The same by tun-rs' offload path.
    TunRs,
    /// The kernel: VXLAN over [`Uplink::Whole`].
    Vxlan,
    /// VXLAN over [`Uplink::Segmented`].
    VxlanSegmented,
    /// VXLAN over [`Uplink::Card`].
    VxlanCard,
    /// Two UDP sockets on the underlay itself: what a tunnel over UDP can reach at most.
    Underlay,
    /// wireguard-go between two nodes, without pods.
    WireguardGo,
    /// nebula between two nodes, without pods.
    Nebula,
    /// Podgate on one node, with so many services.
    PodgateServices(u32),
    /// The same, with pods in mode tun.
    PodgateTunServices(u32),
    /// The same pods, dialled directly.
    PodgateDirect(u32),
    /// kube-proxy's rules in nftables, with so many services.
    Nftables(u32),
    /// kube-proxy's rules in iptables, with so many services.
    Iptables(u32),
    /// Podgate's pipeline in memory, with so many workers.
    Workers(u16),
    /// Podgate's pipeline in memory, with so many flows.
    Flows(u32),
    /// Podgate's compiler in memory, with so many services.
    Compiler(u32),
}

impl Subject {
    /// Its name on the command line and in reports.
    pub fn name(self) -> String {
        let name = match self {
            Subject::Podgate => "podgate",
            Subject::PodgateTun => "podgate-tun",
            Subject::PodgateSegmented => "podgate-segmented",
            Subject::PodgateCard => "podgate-card",
            Subject::Bridge => "bridge",
            Subject::Reflector => "reflector",
            Subject::TunRs => "tun-rs",
            Subject::Vxlan => "vxlan",
            Subject::VxlanSegmented => "vxlan-segmented",
            Subject::VxlanCard => "vxlan-card",
            Subject::Underlay => "underlay",
            Subject::WireguardGo => "wireguard-go",
            Subject::Nebula => "nebula",
            Subject::PodgateServices(count) => return format!("podgate-{count}"),
            Subject::PodgateTunServices(count) => return format!("podgate-tun-{count}"),
            Subject::PodgateDirect(_) => "podgate-direct",
            Subject::Nftables(count) => return format!("nftables-{count}"),
            Subject::Iptables(count) => return format!("iptables-{count}"),
            Subject::Workers(count) => return format!("podgate-{count}-workers"),
            Subject::Flows(count) => return format!("podgate-{count}-flows"),
            Subject::Compiler(count) => return format!("podgate-{count}-services"),
        };
        name.to_owned()
    }

    /// What `--peer` calls it: the kind, whatever its size. Nothing for Podgate itself, which always takes part.
    pub fn peer(self) -> Option<&'static str> {
        match self {
            Subject::Bridge => Some("bridge"),
            Subject::Reflector => Some("reflector"),
            Subject::TunRs => Some("tun-rs"),
            Subject::Vxlan => Some("vxlan"),
            Subject::VxlanSegmented | Subject::PodgateSegmented => Some("vxlan-segmented"),
            Subject::VxlanCard | Subject::PodgateCard => Some("vxlan-card"),
            Subject::Underlay => Some("underlay"),
            Subject::WireguardGo => Some("wireguard-go"),
            Subject::Nebula => Some("nebula"),
            Subject::Nftables(_) => Some("nftables"),
            Subject::Iptables(_) => Some("iptables"),
            _ => None,
        }
    }

    /// Every name that `--peer` takes.
    pub const PEERS: [&'static str; 11] =
        ["bridge", "reflector", "tun-rs", "vxlan", "vxlan-segmented", "vxlan-card", "underlay", "wireguard-go", "nebula", "nftables", "iptables"];

    /// Which programs it needs; the first that this machine lacks, with the package that has it.
    pub fn missing(self) -> Option<&'static str> {
        let needed: &[(&str, &str)] = match self {
            Subject::WireguardGo => &[("wireguard-go", "there is no wireguard-go here (Debian: wireguard-go)")],
            Subject::Nebula => {
                &[("nebula", "there is no nebula here (Debian: nebula)"), ("nebula-cert", "there is no nebula-cert here (Debian: nebula)")]
            }
            Subject::Nftables(_) => &[("nft", "there is no nft here (Debian: nftables)")],
            Subject::Iptables(_) => &[("iptables-nft-restore", "there is no iptables-nft-restore here (Debian: iptables)")],
            _ => &[],
        };
        needed.iter().find(|(name, _)| program(name).is_none()).map(|(_, why)| *why)
    }

    /// Whose bed it lies in.
    pub const fn group(self) -> Group {
        match self {
            Subject::PodgateServices(_) | Subject::PodgateTunServices(_) | Subject::PodgateDirect(_) => Group::Services,
            Subject::Nftables(_) | Subject::Iptables(_) => Group::Services,
            Subject::Workers(_) | Subject::Flows(_) | Subject::Compiler(_) => Group::Memory,
            _ => Group::Nodes,
        }
    }

    /// How many services it has, if that is what sets it apart.
    pub const fn services(self) -> Option<u32> {
        match self {
            Subject::PodgateServices(count) | Subject::PodgateTunServices(count) | Subject::PodgateDirect(count) => Some(count),
            Subject::Nftables(count) | Subject::Iptables(count) | Subject::Compiler(count) => Some(count),
            _ => None,
        }
    }

    /// How its pods are attached.
    pub const fn attach(self) -> &'static str {
        match self {
            Subject::PodgateTun | Subject::PodgateTunServices(_) => "tun",
            _ => "veth",
        }
    }

    /// What its nodes' uplinks do.
    pub const fn uplink(self) -> Uplink {
        match self {
            Subject::PodgateSegmented | Subject::VxlanSegmented => Uplink::Segmented,
            Subject::PodgateCard | Subject::VxlanCard => Uplink::Card,
            _ => Uplink::Whole,
        }
    }
}

/// What the nodes' uplinks (veths) do with superframes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uplink {
    /// They pass whole, as between cards with every offload.
    Whole,
    /// They are cut in software by the sender and arrive as single packets.
    Segmented,
    /// They are cut in software by the sender, and what arrives goes through GRO, as the driver of any card does it.
    Card,
}
