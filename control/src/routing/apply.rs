//! Makes the kernel's rules and routes agree with what is desired, in a safe order.
//!
//! On the node `local` exists at every step: while pref 0 is rebuilt it also stands at pref 1. `ip rule flush` spares pref 0
//! (the kernel does not name preference 0 in its answers, and iproute2 deletes what is named), so the node stays reachable
//! through it. In the gateway's namespace the blackhole comes first and the kernel's two permissive rules go next.
//!
//! What is *ours* is told by its form: `protocol kernel` and one of our tables, devices or preferences. So a lost state file
//! leaves nothing behind, and what others made is never touched. On the node, rules that were there before us in exactly our
//! form are kept by [`crate::host_state`] and spared.

use super::{CLUSTER_TABLE, Desired, HOST_TABLE, METRIC_CLOSED, PREF_CLOSED, PREF_LOCAL_AGAIN, PREF_MEANWHILE, PREF_POD, UP_TABLE};
use crate::netlink::{
    Family, MissingIsFine, Netlink, NetlinkError, ORIGIN_KERNEL, Route, RouteKind, RouteSpec, Rule, RuleAction, RuleSpec, TABLE_LOCAL, TABLE_MAIN,
};
use std::collections::HashSet;
use std::fmt;

/// Where rules and routes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// In the gateway's own namespace.
    Gateway,
    /// In the node's.
    Node,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Gateway => "the gateway's namespace",
            Side::Node => "the node",
        })
    }
}

/// Why policy routing cannot be set up at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RoutingError {
    /// The host has moved the local table away from the front.
    #[error(
        "{family}: the rule \"pref 0 lookup local\" is missing (first rule: {found}); hosts with VRFs move it, and the gateway needs it there: \
         put it back with `ip {flag} rule add pref 0 lookup local`, or run the gateway on a host without VRFs"
    )]
    LocalNotFirst {
        /// Whose rules.
        family: Family,
        /// What is first instead.
        found: String,
        /// The family as `ip` takes it.
        flag: &'static str,
    },
    /// A rule of another's stands in front of ours and would be deleted in its place.
    #[error("{ours} cannot be deleted: {other} is not ours, comes first and would be deleted instead; move it to another preference")]
    Shadowed {
        /// What should go.
        ours: Box<RuleSpec>,
        /// What would go.
        other: Box<RuleSpec>,
    },
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// What [`apply`] did.
#[derive(Debug, Default)]
pub struct Changes {
    /// What was added, as `ip` would show it.
    pub added: Vec<String>,
    /// What was removed.
    pub removed: Vec<String>,
    /// What could not be done; everything else was. Worth another try when something changes.
    pub failed: Vec<RoutingError>,
}

impl Changes {
    /// Whether everything was as desired already.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.failed.is_empty()
    }

    fn note(&mut self, list: fn(&mut Changes) -> &mut Vec<String>, what: &dyn fmt::Display, done: Result<(), NetlinkError>) {
        match done {
            Ok(()) => list(self).push(what.to_string()),
            Err(error) => self.failed.push(error.into()),
        }
    }

    fn add_rule(&mut self, netlink: &Netlink, rule: &RuleSpec) {
        self.note(|changes| &mut changes.added, rule, present_is_fine(netlink.add_rule(rule)));
    }

    fn delete_rule(&mut self, netlink: &Netlink, rule: &RuleSpec) {
        self.note(|changes| &mut changes.removed, rule, netlink.delete_rule(rule).or_missing());
    }

    fn replace_route(&mut self, netlink: &Netlink, route: &RouteSpec) {
        self.note(|changes| &mut changes.added, route, netlink.replace_route(route));
    }

    fn delete_route(&mut self, netlink: &Netlink, route: &RouteSpec) {
        self.note(|changes| &mut changes.removed, route, netlink.delete_route(route).or_missing());
    }
}

fn present_is_fine(done: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match done {
        Err(error) if error.is_present_already() => Ok(()),
        other => other,
    }
}

/// What tells our rules and routes from others'.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ours {
    /// Which side.
    pub side: Side,
    /// The TUN there.
    pub device: String,
    /// Rules in our form that others made before us: never deleted.
    pub spared: Vec<RuleSpec>,
}

impl Ours {
    fn rule(&self, rule: &Rule) -> bool {
        let spec = &rule.spec;
        if !rule.exact || spec.origin != ORIGIN_KERNEL || self.spared.contains(spec) {
            return false;
        }
        let bare = spec.iif.is_none() && spec.from.is_none() && spec.to.is_none() && spec.protocol.is_none() && spec.dport.is_none();
        match (spec.pref, spec.action) {
            (0, RuleAction::Lookup(TABLE_LOCAL)) => spec.iif.as_ref() == Some(&self.device),
            (0, RuleAction::Goto(_)) => spec.to.is_some() && spec.protocol.is_some() && spec.iif.is_none(),
            (PREF_MEANWHILE | PREF_LOCAL_AGAIN, RuleAction::Lookup(TABLE_LOCAL)) => bare,
            (_, RuleAction::Lookup(HOST_TABLE | CLUSTER_TABLE | UP_TABLE)) => true,
            _ => false,
        }
    }

    fn route(&self, route: &RouteSpec) -> bool {
        let closed = route.kind == RouteKind::Unreachable && route.metric == METRIC_CLOSED;
        route.origin == ORIGIN_KERNEL
            && matches!(route.table, HOST_TABLE | CLUSTER_TABLE | UP_TABLE)
            && (closed || route.device.as_ref() == Some(&self.device))
    }

    fn tables(&self) -> &'static [u32] {
        match self.side {
            Side::Gateway => &[TABLE_MAIN, UP_TABLE],
            Side::Node => &[HOST_TABLE, CLUSTER_TABLE],
        }
    }
}

/// Whether a rule is the plain `lookup local` at 0, whoever made it.
fn is_local(rule: &Rule) -> bool {
    rule.exact && rule.spec.clone().origin(ORIGIN_KERNEL) == local_at(rule.spec.family, 0)
}

fn local_at(family: Family, pref: u32) -> RuleSpec {
    RuleSpec::new(family, pref, RuleAction::Lookup(TABLE_LOCAL))
}

/// Makes the side that `netlink` is on agree with `desired`.
///
/// A step that fails is reported in the [`Changes`] and does not stop the others: routes of one family must not wait for an
/// address of the other. An error is returned only where nothing should be touched at all.
pub fn apply(netlink: &Netlink, ours: &Ours, desired: &Desired) -> Result<Changes, RoutingError> {
    let mut changes = Changes::default();
    let present: HashSet<String> = netlink.links()?.into_iter().map(|link| link.name).collect();
    let desired = &within_reach(desired, &present);
    for family in Family::BOTH {
        let rules = match netlink.rules(family) {
            Err(error) if matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => continue, // a kernel without IPv6
            other => other?,
        };
        let wanted: Vec<&RuleSpec> = desired.rules.iter().filter(|rule| rule.family == family).collect();
        match ours.side {
            Side::Gateway => close(netlink, family, &rules, &mut changes),
            Side::Node if !wanted.is_empty() => refuse_displaced_local(family, &rules, ours)?,
            Side::Node => {}
        }
        let superfluous_routes = add_routes(netlink, ours, family, desired, &mut changes)?;
        let (first, later): (Vec<&RuleSpec>, Vec<&RuleSpec>) = wanted.into_iter().partition(|rule| rule.pref == 0);
        for rule in &later {
            if !rules.iter().any(|found| found.is(rule)) {
                changes.add_rule(netlink, rule);
            }
        }
        at_the_front(netlink, ours, family, &rules, &first, &mut changes);
        for rule in rules.iter().filter(|rule| rule.spec.pref != 0 && superfluous(ours, &present, rule) && !later.contains(&&rule.spec)) {
            delete_exactly(netlink, family, &rule.spec, &mut changes);
        }
        superfluous_routes.iter().for_each(|route| changes.delete_route(netlink, route));
    }
    Ok(changes)
}

/// Takes everything of ours off the side that `netlink` is on; `local` stays at 0.
pub fn withdraw(netlink: &Netlink, ours: &Ours) -> Result<Changes, RoutingError> {
    apply(netlink, ours, &Desired::default())
}

/// What can be had while some interfaces are missing: their routes come with them, the `unreachable` ones stand meanwhile. Nor do
/// the rules of a pod stay whose veth is gone.
fn within_reach(desired: &Desired, present: &HashSet<String>) -> Desired {
    let there = |device: &Option<String>| device.as_ref().is_none_or(|device| present.contains(device));
    Desired {
        rules: desired.rules.iter().filter(|rule| rule.pref != PREF_POD || there(&rule.iif)).cloned().collect(),
        routes: desired.routes.iter().filter(|route| there(&route.device)).cloned().collect(),
    }
}

/// The gateway's namespace is ours alone: there every rule that is not wanted goes, but for those of the pods that are there:
/// they come and go with them. On the node only what is in our form.
fn superfluous(ours: &Ours, present: &HashSet<String>, rule: &Rule) -> bool {
    match ours.side {
        Side::Gateway if rule.spec.pref == PREF_POD => rule.spec.iif.as_ref().is_none_or(|veth| !present.contains(veth)),
        Side::Gateway => rule.spec.pref != PREF_CLOSED,
        Side::Node => ours.rule(rule),
    }
}

fn close(netlink: &Netlink, family: Family, rules: &[Rule], changes: &mut Changes) {
    let closed = RuleSpec::new(family, PREF_CLOSED, RuleAction::Blackhole);
    if !rules.iter().any(|rule| rule.is(&closed)) {
        changes.add_rule(netlink, &closed);
    }
    for rule in rules.iter().filter(|rule| rule.spec.pref > PREF_CLOSED) {
        changes.delete_rule(netlink, &rule.spec);
    }
}

fn refuse_displaced_local(family: Family, rules: &[Rule], ours: &Ours) -> Result<(), RoutingError> {
    if rules.iter().any(|rule| is_local(rule) || ours.rule(rule)) {
        return Ok(()); // in place, or we were interrupted, or somebody removed it while we were at work
    }
    let found = rules.first().map_or_else(|| "none".to_owned(), |rule| rule.spec.to_string());
    let flag = if family == Family::V4 { "-4" } else { "-6" };
    Err(RoutingError::LocalNotFirst { family, found, flag })
}

/// Brings the rules at pref 0 into the desired order: ours, then `local`.
fn at_the_front(netlink: &Netlink, ours: &Ours, family: Family, rules: &[Rule], wanted: &[&RuleSpec], changes: &mut Changes) {
    let mine = |rule: &&Rule| rule.spec.pref == 0 && (is_local(rule) || ours.rule(rule));
    let found: Vec<RuleSpec> = rules.iter().filter(mine).map(|rule| rule.spec.clone()).collect();
    let local = local_at(family, 0);
    let plain = [&local];
    let wanted = if wanted.is_empty() { &plain[..] } else { wanted };
    let normalised = |rule: &RuleSpec| if rule.clone().origin(ORIGIN_KERNEL) == local { local.clone() } else { rule.clone() };
    let meanwhile = local_at(family, PREF_MEANWHILE);
    if found.iter().map(normalised).eq(wanted.iter().map(|rule| (*rule).clone())) {
        if rules.iter().any(|rule| rule.is(&meanwhile)) {
            changes.delete_rule(netlink, &meanwhile); // we were interrupted in the middle of what follows
        }
        return;
    }
    // From the first difference on, everything of ours at pref 0 is taken out and put in again, because a rule can only be put
    // behind those of its preference. Meanwhile `local` stands at pref 1.
    if !rules.iter().any(|rule| rule.is(&meanwhile)) {
        let done = present_is_fine(netlink.add_rule(&meanwhile));
        if let Err(error) = done {
            changes.failed.push(error.into());
            return;
        }
    }
    let mut gone: Vec<RuleSpec> = Vec::new();
    for rule in most_particular_first(&found) {
        match first_agreeing(netlink, family, rule) {
            Ok(Some(hit)) if hit.is(rule) => {
                if netlink.delete_rule(rule).map_err(|error| changes.failed.push(error.into())).is_ok() {
                    gone.push(rule.clone());
                }
            }
            Ok(Some(hit)) => changes.failed.push(RoutingError::Shadowed { ours: rule.clone().into(), other: hit.spec.into() }),
            Ok(None) => {}
            Err(error) => changes.failed.push(error.into()),
        }
    }
    let mut back: Vec<RuleSpec> = Vec::new();
    for rule in wanted {
        match present_is_fine(netlink.add_rule(rule)) {
            Ok(()) => back.push((*rule).clone()),
            Err(error) => changes.failed.push(error.into()),
        }
    }
    if back.contains(&local)
        && let Err(error) = netlink.delete_rule(&meanwhile).or_missing()
    {
        changes.failed.push(error.into());
    }
    changes.added.extend(back.iter().filter(|rule| !found.iter().map(normalised).any(|found| found == **rule)).map(ToString::to_string));
    changes.removed.extend(gone.iter().map(normalised).filter(|rule| !back.contains(rule)).map(|rule| rule.to_string()));
    if changes.is_empty() {
        changes.added.push(format!("{family} rules at pref 0, in order"));
    }
}

/// A deletion takes the first rule that agrees in what it names, so the rules that name most go first.
fn most_particular_first(rules: &[RuleSpec]) -> Vec<&RuleSpec> {
    let mut sorted: Vec<&RuleSpec> = rules.iter().collect();
    let names = |rule: &RuleSpec| usize::from(rule.iif.is_some()) + usize::from(rule.to.is_some()) + usize::from(rule.protocol.is_some());
    sorted.sort_by_key(|rule| std::cmp::Reverse(names(rule)));
    sorted
}

fn first_agreeing(netlink: &Netlink, family: Family, asked: &RuleSpec) -> Result<Option<Rule>, NetlinkError> {
    Ok(netlink.rules(family)?.into_iter().find(|rule| asked.would_delete(rule)))
}

fn delete_exactly(netlink: &Netlink, family: Family, rule: &RuleSpec, changes: &mut Changes) {
    match first_agreeing(netlink, family, rule) {
        Ok(Some(hit)) if hit.is(rule) || hit.spec == *rule => changes.delete_rule(netlink, rule),
        Ok(Some(hit)) => changes.failed.push(RoutingError::Shadowed { ours: rule.clone().into(), other: hit.spec.into() }),
        Ok(None) => {}
        Err(error) => changes.failed.push(error.into()),
    }
}

/// Adds what is missing, and tells what is superfluous: that goes last, when no rule leads to it any more.
fn add_routes(netlink: &Netlink, ours: &Ours, family: Family, desired: &Desired, changes: &mut Changes) -> Result<Vec<RouteSpec>, NetlinkError> {
    let mut superfluous = Vec::new();
    for table in ours.tables() {
        let found = netlink.routes(family, *table)?;
        let wanted: Vec<&RouteSpec> = desired.routes.iter().filter(|route| route.family() == family && route.table == *table).collect();
        // The closed ones first, so that there is no moment in which a destination leaks to another table.
        let (closed, open): (Vec<&RouteSpec>, Vec<&RouteSpec>) = wanted.iter().partition(|route| route.kind == RouteKind::Unreachable);
        for route in closed.into_iter().chain(open) {
            if !found.iter().any(|there| there.is(route)) {
                changes.replace_route(netlink, route);
            }
        }
        let unwanted = found.into_iter().filter(|route| superfluous_route(ours, route));
        superfluous.extend(unwanted.map(|route| route.spec).filter(|route| !wanted.iter().any(|wanted| wanted.takes_the_place_of(route))));
    }
    Ok(superfluous)
}

fn superfluous_route(ours: &Ours, route: &Route) -> bool {
    match ours.side {
        // The pods' own routes come and go with them.
        Side::Gateway => route.spec.destination.prefix() < route.spec.family().bits() && route.spec.kind != RouteKind::Other(5),
        Side::Node => ours.route(&route.spec),
    }
}
