//! Policy-routing rules (`ip rule`): which table, if any, a packet is looked up in.
//!
//! Two facts of `net/core/fib_rules.c` shape this module. A new rule goes *behind* those of the same preference. And a deletion
//! takes the *first* rule that agrees in what the request names: what it does not name matches everything, so "delete
//! `pref 0 lookup local`" also takes `pref 0 iif host lookup local`, if that comes first. [`RuleSpec::would_delete`] says so.

use super::socket::Doing;
use super::{Family, Netlink, NetlinkError, ORIGIN_KERNEL};
use ipnetwork::IpNetwork;
use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, Nla};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction as KernelAction, RuleAttribute, RuleFlags, RuleMessage, RulePortRange};
use netlink_packet_route::{IpProtocol, RouteNetlinkMessage};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::RangeInclusive;

/// What becomes of a packet that a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RuleAction {
    /// It is looked up in this table; where that has no route, the next rule is tried.
    Lookup(u32),
    /// The rules go on at this preference, which must be a later one.
    Goto(u32),
    /// It is dropped without a word.
    Blackhole,
    /// It is answered "unreachable".
    Unreachable,
    /// It is answered "prohibited".
    Prohibit,
    /// Nothing, or an action that is not known here.
    Other(u8),
}

/// A rule as we write one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleSpec {
    /// Which family's packets it is for.
    pub family: Family,
    /// Its place: rules are tried in ascending order.
    pub pref: u32,
    /// The interface the packet came in by; `lo` for packets that the node itself makes.
    pub iif: Option<String>,
    /// Its source.
    pub from: Option<IpNetwork>,
    /// Its destination.
    pub to: Option<IpNetwork>,
    /// Its protocol (6 TCP, 17 UDP).
    pub protocol: Option<u8>,
    /// Its destination ports. The kernel takes at most 65534 as the upper end.
    pub dport: Option<(u16, u16)>,
    /// What becomes of it.
    pub action: RuleAction,
    /// Who made it (`RTPROT_…`).
    pub origin: u8,
}

impl RuleSpec {
    /// A rule for every packet of `family`, `protocol kernel`.
    pub fn new(family: Family, pref: u32, action: RuleAction) -> RuleSpec {
        RuleSpec { family, pref, iif: None, from: None, to: None, protocol: None, dport: None, action, origin: ORIGIN_KERNEL }
    }

    /// Only for packets that came in by this interface.
    pub fn iif(mut self, name: impl Into<String>) -> RuleSpec {
        self.iif = Some(name.into());
        self
    }

    /// Only for packets from there.
    pub fn from(mut self, network: IpNetwork) -> RuleSpec {
        self.from = Some(network);
        self
    }

    /// Only for packets to there.
    pub fn to(mut self, network: IpNetwork) -> RuleSpec {
        self.to = Some(network);
        self
    }

    /// Only for packets of this protocol.
    pub fn protocol(mut self, protocol: u8) -> RuleSpec {
        self.protocol = Some(protocol);
        self
    }

    /// Only for packets to these ports.
    pub fn dport(mut self, ports: RangeInclusive<u16>) -> RuleSpec {
        self.dport = Some((*ports.start(), *ports.end()));
        self
    }

    /// Made by another.
    pub fn origin(mut self, origin: u8) -> RuleSpec {
        self.origin = origin;
        self
    }

    /// Whether a request to delete `self` would take `rule`, if it came first (`rule_find` in `net/core/fib_rules.c`).
    pub fn would_delete(&self, rule: &Rule) -> bool {
        let found = &rule.spec;
        fn agrees<T: PartialEq>(asked: &Option<T>, found: &Option<T>) -> bool {
            asked.is_none() || asked == found
        }
        self.family == found.family
            && self.pref == found.pref
            && self.action == found.action
            && (self.origin == 0 || self.origin == found.origin)
            && agrees(&self.iif, &found.iif)
            && agrees(&self.from, &found.from)
            && agrees(&self.to, &found.to)
            && agrees(&self.protocol, &found.protocol)
            && agrees(&self.dport, &found.dport)
    }

    fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = self.family.kernel();
        let attributes = &mut message.attributes;
        attributes.push(RuleAttribute::Priority(self.pref));
        attributes.push(RuleAttribute::Protocol(RouteProtocol::from(self.origin)));
        attributes.extend(self.iif.clone().map(RuleAttribute::Iifname));
        attributes.extend(self.protocol.map(|protocol| RuleAttribute::IpProtocol(IpProtocol::from(protocol))));
        attributes.extend(self.dport.map(|(start, end)| RuleAttribute::DestinationPortRange(RulePortRange { start, end })));
        if let Some(network) = self.from {
            message.header.src_len = network.prefix();
            attributes.push(RuleAttribute::Source(network.network()));
        }
        if let Some(network) = self.to {
            message.header.dst_len = network.prefix();
            attributes.push(RuleAttribute::Destination(network.network()));
        }
        message.header.action = match self.action {
            RuleAction::Lookup(table) => {
                attributes.push(RuleAttribute::Table(table));
                KernelAction::ToTable
            }
            RuleAction::Goto(pref) => {
                attributes.push(RuleAttribute::Goto(pref));
                KernelAction::Goto
            }
            RuleAction::Blackhole => KernelAction::Blackhole,
            RuleAction::Unreachable => KernelAction::Unreachable,
            RuleAction::Prohibit => KernelAction::Prohibit,
            RuleAction::Other(action) => action.into(),
        };
        message
    }
}

impl fmt::Display for RuleSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rule pref {}", self.family, self.pref)?;
        if let Some(from) = self.from {
            write!(f, " from {from}")?;
        }
        if let Some(to) = self.to {
            write!(f, " to {to}")?;
        }
        if let Some(iif) = &self.iif {
            write!(f, " iif {iif}")?;
        }
        if let Some(protocol) = self.protocol {
            match protocol {
                6 => write!(f, " ipproto tcp")?,
                17 => write!(f, " ipproto udp")?,
                132 => write!(f, " ipproto sctp")?,
                other => write!(f, " ipproto {other}")?,
            }
        }
        match self.dport {
            Some((start, end)) if start == end => write!(f, " dport {start}")?,
            Some((start, end)) => write!(f, " dport {start}-{end}")?,
            None => {}
        }
        match self.action {
            RuleAction::Lookup(255) => write!(f, " lookup local"),
            RuleAction::Lookup(254) => write!(f, " lookup main"),
            RuleAction::Lookup(253) => write!(f, " lookup default"),
            RuleAction::Lookup(table) => write!(f, " lookup {table}"),
            RuleAction::Goto(pref) => write!(f, " goto {pref}"),
            RuleAction::Blackhole => write!(f, " blackhole"),
            RuleAction::Unreachable => write!(f, " unreachable"),
            RuleAction::Prohibit => write!(f, " prohibit"),
            RuleAction::Other(action) => write!(f, " action {action}"),
        }
    }
}

/// A rule as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What can be said of it in our words.
    pub spec: RuleSpec,
    /// Whether that is all. Rules with marks, users, an output interface or `not` are others' and never taken for ours.
    pub exact: bool,
}

impl Rule {
    /// Whether this is exactly what `spec` asks for.
    pub fn is(&self, spec: &RuleSpec) -> bool {
        self.exact && self.spec == *spec
    }
}

impl Netlink {
    /// The rules of one family in the order in which the kernel tries them.
    pub fn rules(&self, family: Family) -> Result<Vec<Rule>, NetlinkError> {
        let mut message = RuleMessage::default();
        message.header.family = family.kernel();
        let object = format_args!("{family} rules");
        let found = self.transport.dumped(Doing { operation: "list", object: &object }, RouteNetlinkMessage::GetRule(message))?;
        Ok(found.into_iter().filter_map(rule_of).filter(|rule| rule.spec.family == family).collect())
    }

    /// Adds a rule behind those of the same preference. That it is there already is an error (`EEXIST`).
    pub fn add_rule(&self, spec: &RuleSpec) -> Result<(), NetlinkError> {
        let doing = Doing { operation: "add", object: spec };
        self.transport.acknowledged(doing, RouteNetlinkMessage::NewRule(spec.message()), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Deletes the first rule that agrees with `spec`, see the module's notes.
    pub fn delete_rule(&self, spec: &RuleSpec) -> Result<(), NetlinkError> {
        self.transport.acknowledged(Doing { operation: "delete", object: spec }, RouteNetlinkMessage::DelRule(spec.message()), 0)
    }
}

/// `FRA_SPORT_MASK`, `FRA_DPORT_MASK`: with a single port, newer kernels say that all its bits count (Linux 6.15).
const PORT_MASKS: [u16; 2] = [28, 29];

fn says_the_default(attribute: &DefaultNla) -> bool {
    let mut mask = [0; 2];
    if !PORT_MASKS.contains(&attribute.kind()) || attribute.value_len() != mask.len() {
        return false;
    }
    attribute.emit_value(&mut mask);
    mask == [0xff; 2]
}

pub(super) fn rule_of(message: RouteNetlinkMessage) -> Option<Rule> {
    let (RouteNetlinkMessage::NewRule(message) | RouteNetlinkMessage::DelRule(message)) = message else { return None };
    let family = Family::from_kernel(message.header.family)?;
    let mut spec = RuleSpec::new(family, 0, RuleAction::Other(0)).origin(0);
    let mut exact = message.header.tos == 0 && !message.header.flags.contains(RuleFlags::Invert);
    let (mut table, mut target) = (u32::from(message.header.table), 0);
    for attribute in message.attributes {
        match attribute {
            RuleAttribute::Priority(pref) => spec.pref = pref,
            RuleAttribute::Iifname(name) => spec.iif = Some(name),
            RuleAttribute::Source(address) => spec.from = IpNetwork::new(address, message.header.src_len).ok(),
            RuleAttribute::Destination(address) => spec.to = IpNetwork::new(address, message.header.dst_len).ok(),
            RuleAttribute::IpProtocol(protocol) => spec.protocol = Some(protocol.into()),
            RuleAttribute::DestinationPortRange(range) => spec.dport = Some((range.start, range.end)),
            RuleAttribute::Protocol(protocol) => spec.origin = protocol.into(),
            RuleAttribute::Table(number) => table = number,
            RuleAttribute::Goto(pref) => target = pref,
            // The kernel's way of saying "not used" (net/core/fib_rules.c, fib_nl_fill_rule).
            RuleAttribute::SuppressPrefixLen(u32::MAX) | RuleAttribute::SuppressIfGroup(u32::MAX) => {}
            RuleAttribute::L3MDev(false) => {}
            RuleAttribute::Other(attribute) if says_the_default(&attribute) => {}
            _ => exact = false,
        }
    }
    spec.action = match message.header.action {
        KernelAction::ToTable => RuleAction::Lookup(table),
        KernelAction::Goto => RuleAction::Goto(target),
        KernelAction::Blackhole => RuleAction::Blackhole,
        KernelAction::Unreachable => RuleAction::Unreachable,
        KernelAction::Prohibit => RuleAction::Prohibit,
        other => RuleAction::Other(other.into()),
    };
    Some(Rule { spec, exact })
}
