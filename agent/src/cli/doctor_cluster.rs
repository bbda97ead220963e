//! Whether an environment's cluster answers, has its namespace, and lets the agent do what releases need.
//!
//! The line: version → namespace and rights side by side → findings. Rights are asked one by one
//! (SelfSubjectAccessReview), since a list of rules may leave out what an authorizer beside RBAC allows.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::StreamExt;
use futures_util::stream;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use k8s_openapi::api::core::v1::Namespace;
use kube::Api;
use kube::api::PostParams;

use super::doctor::{limited, name};
use super::findings::Finding;
use crate::cluster::Cluster;
use crate::config::Environment;

/// What a release does with each of its kinds.
const VERBS: [&str; 6] = ["get", "list", "watch", "create", "patch", "delete"];
/// At a time, so that a small API server is not flooded.
const QUESTIONS_AT_ONCE: usize = 16;
/// In one line; the others are counted.
const SHOWN_MAX: usize = 12;

/// Group and plural of the kinds that agent.yaml may allow by their bare name.
const KINDS: [(&str, &str, &str); 16] = [
    ("Deployment", "apps", "deployments"),
    ("StatefulSet", "apps", "statefulsets"),
    ("DaemonSet", "apps", "daemonsets"),
    ("Job", "batch", "jobs"),
    ("CronJob", "batch", "cronjobs"),
    ("Service", "", "services"),
    ("Ingress", "networking.k8s.io", "ingresses"),
    ("NetworkPolicy", "networking.k8s.io", "networkpolicies"),
    ("ConfigMap", "", "configmaps"),
    ("Secret", "", "secrets"),
    (
        "HorizontalPodAutoscaler",
        "autoscaling",
        "horizontalpodautoscalers",
    ),
    ("PodDisruptionBudget", "policy", "poddisruptionbudgets"),
    ("PersistentVolumeClaim", "", "persistentvolumeclaims"),
    ("ServiceAccount", "", "serviceaccounts"),
    ("Role", "rbac.authorization.k8s.io", "roles"),
    ("RoleBinding", "rbac.authorization.k8s.io", "rolebindings"),
];

/// What planning, the lease, verifying and the way back need besides: verb, group, resource (with its subresource).
const BESIDES: [(&str, &str, &str); 15] = [
    ("create", "", "pods"),
    ("delete", "", "pods"),
    ("get", "coordination.k8s.io", "leases"),
    ("create", "coordination.k8s.io", "leases"),
    ("update", "coordination.k8s.io", "leases"),
    ("get", "", "pods"),
    ("list", "", "pods"),
    ("watch", "", "pods"),
    ("get", "", "pods/log"),
    ("get", "", "pods/proxy"),
    ("get", "", "services/proxy"),
    ("list", "", "events"),
    ("list", "apps", "replicasets"),
    ("list", "discovery.k8s.io", "endpointslices"),
    ("list", "autoscaling", "horizontalpodautoscalers"),
];

/// One thing that the agent must be allowed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    /// `deployments.apps`, as `kubectl auth can-i` names it.
    resource: String,
    verb: &'static str,
}

pub async fn check(environment: &Environment) -> Vec<Finding> {
    let reached = limited(&name(environment, "cluster"), async {
        vec![reach(environment).await]
    })
    .await;
    if super::findings::any_failed(&reached) {
        return reached;
    }
    let Ok(cluster) = Cluster::connect(environment).await else {
        return reached;
    };
    let (namespace_name, rights_name) =
        (name(environment, "namespace"), name(environment, "rights"));
    let namespace = limited(&namespace_name, async {
        vec![check_namespace(&cluster, environment).await]
    });
    let rights = limited(&rights_name, check_rights(&cluster, environment));
    let (namespace, rights) = tokio::join!(namespace, rights);
    reached.into_iter().chain(namespace).chain(rights).collect()
}

async fn reach(environment: &Environment) -> Finding {
    let check = name(environment, "cluster");
    let fix = "is `kubeconfig` (and `context`) the right one, and the cluster up? `kubectl --kubeconfig FILE version` must answer";
    let cluster = match Cluster::connect(environment).await {
        Ok(cluster) => cluster,
        Err(error) => return Finding::fail(check, format!("{error:#}"), fix),
    };
    match cluster.client.apiserver_version().await {
        Ok(version) => Finding::ok(check, format!("Kubernetes {}", version.git_version)),
        Err(kube::Error::Api(status)) => Finding::fail(
            check,
            format!("it refuses us: {}", status.message),
            "renew the credentials of the kubeconfig",
        ),
        Err(error) => Finding::fail(check, format!("cannot reach it: {}", root_of(error)), fix),
    }
}

/// What happened to the connection, without what each layer between adds.
fn root_of(error: kube::Error) -> String {
    anyhow::Error::new(error).root_cause().to_string()
}

async fn check_namespace(cluster: &Cluster, environment: &Environment) -> Finding {
    let check = name(environment, "namespace");
    let namespace = &environment.namespace;
    let found = Api::<Namespace>::all(cluster.client.clone())
        .get_opt(namespace)
        .await;
    match found {
        Ok(Some(found)) if found.metadata.deletion_timestamp.is_some() => Finding::fail(
            check,
            format!("{namespace} is being deleted"),
            "wait until it is gone, then make it anew",
        ),
        Ok(Some(_)) => Finding::ok(check, namespace.clone()),
        Ok(None) if environment.create_namespace => Finding::ok(
            check,
            format!("{namespace} is not there yet; the first release makes it"),
        ),
        Ok(None) => {
            let fix =
                format!("kubectl create namespace {namespace}; or set `create_namespace: true`");
            Finding::fail(check, format!("{namespace} is not there"), fix)
        }
        Err(kube::Error::Api(status)) if status.code == 403 => {
            let fix = format!(
                "let the agent `get` it: kubectl create clusterrole landfall-{namespace} --verb=get --resource=namespaces --resource-name={namespace}, and bind it"
            );
            Finding::fail(check, format!("the agent may not look at {namespace}"), fix)
        }
        Err(error) => Finding::fail(
            check,
            format!("cannot look at {namespace}: {}", root_of(error)),
            "ask again",
        ),
    }
}

async fn check_rights(cluster: &Cluster, environment: &Environment) -> Vec<Finding> {
    let check = name(environment, "rights");
    let (needed, unknown) = needed(&environment.allowed_kinds);
    let count = needed.len();
    let answers = stream::iter(needed)
        .map(async |right| {
            (
                is_allowed(cluster, &environment.namespace, &right).await,
                right,
            )
        })
        .buffer_unordered(QUESTIONS_AT_ONCE)
        .collect::<Vec<_>>()
        .await;
    let mut denied = BTreeSet::new();
    for (answer, right) in answers {
        match answer {
            Ok(true) => {}
            Ok(false) => drop(denied.insert(right)),
            Err(error) => {
                return vec![Finding::fail(
                    check,
                    format!("cannot ask what the agent may do: {}", root_of(error)),
                    "ask again",
                )];
            }
        }
    }
    let mut findings = vec![match denied.is_empty() {
        true => Finding::ok(
            &check,
            format!(
                "all {count} that releases need, in {}",
                environment.namespace
            ),
        ),
        false => Finding::fail(&check, says(&denied), fix(&environment.namespace, &denied)),
    }];
    if !unknown.is_empty() {
        let says = format!("not looked at: {}", unknown.join(", "));
        findings.push(Finding::warn(
            check,
            says,
            "`kubectl auth can-i` tells for other kinds",
        ));
    }
    findings
}

/// What the agent must be allowed, and the kinds of which we do not know how they are asked for.
fn needed(kinds: &[String]) -> (BTreeSet<Right>, Vec<&str>) {
    let full = |group: &str, plural: &str| match (group, plural.split_once('/')) {
        ("", _) => plural.to_owned(),
        (group, Some((plural, sub))) => format!("{plural}.{group}/{sub}"),
        (group, None) => format!("{plural}.{group}"),
    };
    let mut needed: BTreeSet<Right> = BESIDES
        .iter()
        .map(|(verb, group, plural)| Right {
            resource: full(group, plural),
            verb,
        })
        .collect();
    let mut unknown = Vec::new();
    for kind in kinds {
        let bare = kind.split_once('.').map_or(kind.as_str(), |(bare, _)| bare);
        let known = KINDS.iter().find(|(name, group, _)| {
            *name == bare && (bare == kind || kind.ends_with(&format!(".{group}")))
        });
        match known {
            Some((_, group, plural)) => {
                needed.extend(VERBS.map(|verb| Right {
                    resource: full(group, plural),
                    verb,
                }));
            }
            None => unknown.push(kind.as_str()),
        }
    }
    (needed, unknown)
}

async fn is_allowed(cluster: &Cluster, namespace: &str, right: &Right) -> kube::Result<bool> {
    let (path, sub) = right
        .resource
        .split_once('/')
        .map_or((right.resource.as_str(), None), |(path, sub)| {
            (path, Some(sub))
        });
    let (plural, group) = path.split_once('.').unwrap_or((path, ""));
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                namespace: Some(namespace.to_owned()),
                verb: Some(right.verb.to_owned()),
                group: Some(group.to_owned()),
                resource: Some(plural.to_owned()),
                subresource: sub.map(str::to_owned),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    };
    let reviews: Api<SelfSubjectAccessReview> = Api::all(cluster.client.clone());
    let answer = reviews.create(&PostParams::default(), &review).await?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}

/// The verbs of each resource, and the resources that want the same verbs together.
fn by_verbs(denied: &BTreeSet<Right>) -> BTreeMap<String, Vec<&str>> {
    let mut verbs: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for right in denied {
        verbs.entry(&right.resource).or_default().push(right.verb);
    }
    let mut together: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (resource, verbs) in verbs {
        together.entry(verbs.join(",")).or_default().push(resource);
    }
    together
}

fn says(denied: &BTreeSet<Right>) -> String {
    let mut shown: Vec<String> = denied
        .iter()
        .take(SHOWN_MAX)
        .map(|right| format!("{} {}", right.verb, right.resource))
        .collect();
    if denied.len() > SHOWN_MAX {
        shown.push(format!("and {} more", denied.len() - SHOWN_MAX));
    }
    format!("the agent may not {}", shown.join(", "))
}

fn fix(namespace: &str, denied: &BTreeSet<Right>) -> String {
    let roles: Vec<String> = by_verbs(denied)
        .into_iter()
        .enumerate()
        .map(|(index, (verbs, resources))| {
            format!(
                "kubectl -n {namespace} create role landfall-{} --verb={verbs} --resource={}",
                index + 1,
                resources.join(",")
            )
        })
        .collect();
    format!(
        "{}\nand bind each to the user of this kubeconfig: kubectl -n {namespace} create rolebinding",
        roles.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::KINDS_DEFAULT;

    #[test]
    fn every_default_kind_is_known_and_asked_for_with_every_verb() {
        let kinds = KINDS_DEFAULT.map(str::to_owned);
        let (needed, unknown) = needed(&kinds);
        assert!(unknown.is_empty(), "{unknown:?}");
        assert!(needed.len() >= KINDS_DEFAULT.len() * VERBS.len());
        assert!(needed.contains(&Right {
            resource: "deployments.apps".to_owned(),
            verb: "delete"
        }));
    }

    #[test]
    fn kinds_that_are_not_known_are_said_and_not_guessed() {
        let kinds = [
            "Certificate.cert-manager.io",
            "Job.batch",
            "Job.example.org",
        ]
        .map(str::to_owned);
        let (needed, unknown) = needed(&kinds);
        assert_eq!(unknown, ["Certificate.cert-manager.io", "Job.example.org"]);
        assert!(needed.contains(&Right {
            resource: "jobs.batch".to_owned(),
            verb: "patch"
        }));
    }

    #[test]
    fn the_fix_groups_what_is_missing() {
        let denied = ["deployments.apps", "statefulsets.apps"]
            .into_iter()
            .flat_map(|resource| {
                ["create", "patch"].map(|verb| Right {
                    resource: resource.to_owned(),
                    verb,
                })
            });
        let fix = fix("hello", &denied.collect());
        assert!(
            fix.starts_with(
                "kubectl -n hello create role landfall-1 --verb=create,patch --resource=deployments.apps,statefulsets.apps\n"
            ),
            "{fix}"
        );
    }
}
