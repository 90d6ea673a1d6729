//! A model of the firewall, small on purpose: whether it lets a packet of the gateway's pass a hook.
//!
//! A rule has conditions; of each it is known that it holds for the packet in question, that it does not, or neither (a mark, a port, a set).
//! A rule of which that is not known is passed over, whatever it does: an acceptance of some packets is none of all, nor is a refusal. So what
//! is found is what becomes of a plain packet that no special rule is made for. Base chains are walked one by one: the packet must pass all of
//! them.
//!
//! Read first: nft(8), libnftables-json(5), iptables(8).

pub mod read;

use std::net::IpAddr;

use ipnetwork::IpNetwork;

/// How deep chains may call each other (the kernel's `NFT_JUMP_STACK_SIZE`).
const DEPTH_MAX: usize = 16;

/// A chain of rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Who made it: decides how the remedy is written.
    pub tool: Tool,
    /// `ip`, `ip6` or `inet`.
    pub family: String,
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// The hook that packets enter it by; none for one that others call.
    pub hook: Option<Hook>,
    /// Whether what no rule decides is dropped.
    pub policy: Policy,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

/// Who reads and writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// `nft`, or `iptables` in front of nftables.
    Nftables,
    /// `iptables-legacy`.
    Legacy,
}

/// A place at which packets are judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Whatever comes in.
    Prerouting,
    /// What is for the machine itself.
    Input,
    /// What is passed on.
    Forward,
}

/// What becomes of what no rule decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// It passes.
    Accept,
    /// It is dropped.
    Drop,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// All of these must hold.
    pub conditions: Vec<Condition>,
    /// What becomes of the packet then.
    pub action: Action,
    /// The rule as its tool shows it, or close to it.
    pub text: String,
}

/// What a rule does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The packet passes this base chain.
    Accept,
    /// It is dropped or refused.
    Drop,
    /// Back to where the chain was called.
    Return,
    /// The rules of that chain, then the next one here.
    Jump(String),
    /// The rules of that chain, and then none here.
    Goto(String),
    /// Something that decides nothing (a counter, a log line, a mark).
    Nothing,
}

/// A condition of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The interface it came in by is one of these (`eth+` and `eth*` stand for all that begin so), or is none of them.
    In(Vec<String>, Is),
    /// The same for the one that it leaves by.
    Out(Vec<String>, Is),
    /// IPv4, or IPv6.
    V4(bool),
    /// It opens a connection, if that is among the states asked for; `false` where only others are.
    New(bool),
    /// Its source is in one of these.
    From(Vec<IpNetwork>, Is),
    /// Its destination is in one of these.
    To(Vec<IpNetwork>, Is),
    /// There is no way back to its source by the interface that it came in by.
    NoWayBack,
    /// Anything else.
    Unknown,
}

/// Whether a condition is meant as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Is {
    /// As it stands.
    So,
    /// The other way round.
    NotSo,
}

/// A packet in question.
#[derive(Clone, Debug)]
pub struct Packet<'a> {
    /// Where it is judged.
    pub hook: Hook,
    /// The interface it came in by.
    pub iif: &'a str,
    /// The one that it leaves by.
    pub oif: Option<&'a str>,
    /// Whether it is IPv4.
    pub v4: bool,
    /// Its source, where it is one in particular.
    pub from: Option<IpAddr>,
    /// Its destination, where it is one in particular.
    pub to: Option<IpAddr>,
}

/// Who drops a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped<'a> {
    /// The base chain that it came in by.
    pub base: &'a Chain,
    /// The chain in which that is decided.
    pub chain: &'a Chain,
    /// The rule; the policy of the base chain if there is none.
    pub rule: Option<&'a Rule>,
}

/// What a chain came to.
enum Flow<'a> {
    Accepted,
    Dropped(&'a Chain, &'a Rule),
    Undecided,
}

impl Condition {
    /// Whether it holds for `packet`, if that is known.
    fn holds(&self, packet: &Packet<'_>) -> Option<bool> {
        let named = |names: &[String], found: &str, is: Is| names.iter().any(|name| is_like(name, found)) == (is == Is::So);
        let within = |nets: &[IpNetwork], found: Option<IpAddr>, is: Is| found.map(|ip| nets.iter().any(|net| net.contains(ip)) == (is == Is::So));
        match self {
            Condition::In(names, is) => Some(named(names, packet.iif, *is)),
            // Before routing no packet has one: nft compares with nothing then.
            Condition::Out(names, is) => packet.oif.map(|oif| named(names, oif, *is)),
            Condition::V4(v4) => Some(*v4 == packet.v4),
            Condition::New(new) => Some(*new),
            Condition::From(nets, is) => within(nets, packet.from, *is),
            Condition::To(nets, is) => within(nets, packet.to, *is),
            // The way to the node's own address is `local`: it leads out by nothing (net/ipv4/netfilter/nft_fib_ipv4.c, ipt_rpfilter.c).
            Condition::NoWayBack => Some(true),
            Condition::Unknown => None,
        }
    }
}

fn is_like(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix(['*', '+']) {
        Some(beginning) => name.starts_with(beginning),
        None => pattern == name,
    }
}

/// The base chains that drop `packet`, and where.
pub fn droppers<'a>(chains: &'a [Chain], packet: &Packet<'_>) -> Vec<Dropped<'a>> {
    let family = |chain: &Chain| match chain.family.as_str() {
        "ip" => packet.v4,
        "ip6" => !packet.v4,
        "inet" => true,
        _ => false,
    };
    let bases = chains.iter().filter(|chain| chain.hook == Some(packet.hook) && family(chain));
    let dropped = bases.filter_map(|base| match walk(chains, base, packet, 0) {
        Flow::Dropped(chain, rule) => Some(Dropped { base, chain, rule: Some(rule) }),
        Flow::Undecided if base.policy == Policy::Drop => Some(Dropped { base, chain: base, rule: None }),
        _ => None,
    });
    dropped.collect()
}

fn walk<'a>(chains: &'a [Chain], chain: &'a Chain, packet: &Packet<'_>, depth: usize) -> Flow<'a> {
    for rule in &chain.rules {
        if !rule.conditions.iter().all(|condition| condition.holds(packet) == Some(true)) {
            continue;
        }
        match &rule.action {
            Action::Accept => return Flow::Accepted,
            Action::Drop => return Flow::Dropped(chain, rule),
            Action::Return => return Flow::Undecided,
            Action::Nothing => {}
            Action::Jump(name) | Action::Goto(name) => {
                let same_table = |other: &&Chain| other.tool == chain.tool && other.family == chain.family && other.table == chain.table;
                if let Some(called) = chains.iter().filter(same_table).find(|other| other.name == *name).filter(|_| depth < DEPTH_MAX) {
                    match walk(chains, called, packet, depth + 1) {
                        Flow::Undecided if matches!(rule.action, Action::Goto(_)) => return Flow::Undecided,
                        Flow::Undecided => {}
                        decided => return decided,
                    }
                }
            }
        }
    }
    Flow::Undecided
}

#[cfg(test)]
mod tests;
