//! The cluster: what is asked of the API server (`apply`, `observe`), and what is judged without it (`policy`, `rollout`).
//!
//! `Cluster` is one environment's connection. Every question has a limit, is asked again while the server is away or
//! busy, and ends as `Trouble`: the author's to mend, or ours.

pub mod apply;
pub mod availability;
mod container_signs;
pub mod diagnose;
pub mod diff;
pub mod evidence;
pub mod lease;
pub mod observe;
pub mod ownership;
mod pod_signs;
pub mod policy;
pub mod probes;
pub mod proxy;
pub mod refusal;
pub mod rollout;
pub mod sign;
pub mod snapshot;
pub mod tables;
pub mod wiring;
pub mod words;
mod workload_signs;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use kube::client::AuthError;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind, Request, Resource as _, Status};
use kube::{Client, Config};
use serde_json::Value;

use crate::builds::Cause;
use crate::config::{Environment, proxy_for};
use crate::manifests;

/// How long one request may take; the server's own limit is a minute.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(30);
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// While the server is away, and how often it is said.
const WAITING_SAID_AFTER: Duration = Duration::from_millis(500);
const WAITING_SAID_EVERY: Duration = Duration::from_secs(5);

type Tell = Arc<dyn Fn(String) + Send + Sync>;

/// One environment's place in its cluster.
#[derive(Clone)]
pub struct Cluster {
    pub client: Client,
    pub namespace: String,
    /// How long the server may be away before we give up.
    pub unreachable: Duration,
    /// `https://10.0.0.1:6443`, for people.
    server: String,
    /// Hears that the server is waited for.
    tell: Tell,
    /// What discovery said, by apiVersion and kind.
    resources: Arc<Mutex<HashMap<(String, String), Resource>>>,
}

/// How a kind is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    pub api: ApiResource,
    pub namespaced: bool,
}

/// Why something could not be done in the cluster.
#[derive(Debug)]
pub enum Trouble {
    /// The author of the push, or the operator, must mend it.
    Refused(Cause),
    /// The cluster is out of reach, or we are at fault.
    Agent(anyhow::Error),
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Self::Agent(error)
    }
}

/// An answer that is not the one hoped for.
#[derive(Debug)]
pub enum Answer {
    Refused(Box<Status>),
    /// No answer until the limit.
    Away(anyhow::Error),
}

impl Answer {
    /// For questions where no refusal is expected: any is ours to mend.
    pub fn into_error(self, what: &str) -> anyhow::Error {
        match self {
            Self::Refused(status) => anyhow!("cannot {what}: {}", status.message),
            Self::Away(error) => error,
        }
    }
}

impl Cluster {
    /// Reads the kubeconfig of agent.yaml (without one: the service account of the pod that we run in). Asks nothing yet.
    pub async fn connect(environment: &Environment) -> anyhow::Result<Self> {
        let options = KubeConfigOptions {
            context: environment.context.clone(),
            ..KubeConfigOptions::default()
        };
        let mut config = match &environment.kubeconfig {
            Some(path) => {
                let kubeconfig = Kubeconfig::read_from(path)
                    .with_context(|| format!("cannot read the kubeconfig {}", path.display()))?;
                of_kubeconfig(kubeconfig, &options)
                    .await
                    .with_context(|| format!("cannot use the kubeconfig {}", path.display()))?
            }
            None if environment.kubeconfig_of_person => {
                let config = async { of_kubeconfig(Kubeconfig::read()?, &options).await };
                config.await.context(
                    "cannot use your kubeconfig (--kubeconfig, KUBECONFIG, ~/.kube/config)",
                )?
            }
            None => Config::incluster().with_context(|| {
                format!(
                    "environment {} has no `kubeconfig`, and this agent runs in no cluster",
                    environment.name
                )
            })?,
        };
        let namespace = match environment.namespace.as_str() {
            "" => config.default_namespace.clone(),
            named => named.to_owned(),
        };
        config.connect_timeout = Some(CONNECT_LIMIT);
        // Asked again here, with a limit that the operator knows.
        config.default_retry = false;
        config.default_namespace.clone_from(&namespace);
        let server = &config.cluster_url;
        let host = server.host().unwrap_or_default();
        let port = server
            .port()
            .map_or_else(String::new, |port| format!(":{port}"));
        let server = format!("{}://{host}{port}", server.scheme_str().unwrap_or("https"));
        Ok(Self {
            client: Client::try_from(config)
                .map_err(plain)
                .context("cannot make a client of the cluster")?,
            namespace,
            unreachable: Duration::from_secs(environment.limits.unreachable_seconds),
            server,
            tell: Arc::new(|_| {}),
            resources: Arc::default(),
        })
    }

    /// Tells somebody that the server is waited for, while it is away.
    pub fn telling(self, tell: impl Fn(String) + Send + Sync + 'static) -> Self {
        Self {
            tell: Arc::new(tell),
            ..self
        }
    }

    fn patience(&self) -> Patience<'_> {
        Patience {
            cluster: self,
            begun: Instant::now(),
            pause: PAUSE_FIRST,
            said: None,
        }
    }

    /// Objects of one kind in the environment's namespace.
    pub fn api<K>(&self) -> kube::Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        kube::Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// How the object's kind is asked for; None where the cluster does not know it.
    pub async fn resource(&self, object: &Value) -> Result<Option<Resource>, Trouble> {
        let (version, kind) = (manifests::api_version(object), manifests::kind(object));
        let key = (version.to_owned(), kind.to_owned());
        if let Some(known) = self.lock().get(&key) {
            return Ok(Some(known.clone()));
        }
        let (group, short) = version.split_once('/').unwrap_or(("", version));
        let folder = if group.is_empty() { "api" } else { "apis" };
        let request = hyper::Request::get(format!("/{folder}/{version}"))
            .body(Vec::new())
            .context("cannot ask for the kinds of a group")?;
        let list = match self.send("ask the cluster for its kinds", &request).await {
            Ok(list) => list,
            Err(Answer::Refused(status)) if status.code == 404 => return Ok(None),
            Err(answer) => return Err(answer.into_error("ask the cluster for its kinds").into()),
        };
        let found = list
            .pointer("/resources")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .find(|resource| {
                manifests::kind(resource) == kind
                    && !manifests::text(resource, "/name").contains('/')
            });
        let resource = found.map(|found| Resource {
            api: ApiResource {
                plural: manifests::text(found, "/name").to_owned(),
                ..ApiResource::from_gvk(&GroupVersionKind::gvk(group, short, kind))
            },
            namespaced: found
                .get("namespaced")
                .and_then(Value::as_bool)
                .unwrap_or(true),
        });
        if let Some(resource) = &resource {
            self.lock().insert(key, resource.clone());
        }
        Ok(resource)
    }

    /// New kinds were made: what discovery said is old.
    pub fn forget_resources(&self) {
        self.lock().clear();
    }

    /// None where there is no such object.
    pub async fn get(&self, resource: &Resource, name: &str) -> Result<Option<Value>, Answer> {
        let request = self
            .request(resource)
            .get(name, &kube::api::GetParams::default());
        let request = request.map_err(|error| Answer::Away(error.into()))?;
        let what = format!("read {}/{name}", resource.api.plural);
        match self.send(&what, &request).await {
            Ok(object) => Ok(Some(object)),
            Err(Answer::Refused(status)) if status.code == 404 => Ok(None),
            Err(answer) => Err(answer),
        }
    }

    /// All objects of a kind in the environment's namespace.
    pub async fn list(&self, resource: &Resource) -> Result<Vec<Value>, Answer> {
        let request = self
            .request(resource)
            .list(&kube::api::ListParams::default());
        let request = request.map_err(|error| Answer::Away(error.into()))?;
        let mut list = self
            .send(&format!("list {}", resource.api.plural), &request)
            .await?;
        Ok(match list.pointer_mut("/items").map(Value::take) {
            Some(Value::Array(items)) => items,
            _ => Vec::new(),
        })
    }

    /// The beginning of a request about objects of a kind.
    pub fn request(&self, resource: &Resource) -> Request {
        let namespace = resource.namespaced.then_some(self.namespace.as_str());
        Request::new(DynamicObject::url_path(&resource.api, namespace))
    }

    /// Sends, and sends again while the server is away or busy, for at most `unreachable`.
    pub async fn send(
        &self,
        what: &str,
        request: &hyper::Request<Vec<u8>>,
    ) -> Result<Value, Answer> {
        let mut patience = self.patience();
        loop {
            let answer = patience.ask(self.client.request::<Value>(request.clone()));
            let error = match answer.await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(kube::Error::Api(status))) if !is_transient(&status) => {
                    return Err(Answer::Refused(status));
                }
                Ok(Err(error)) => plain(error),
                Err(silence) => silence,
            };
            patience.wait(what, error).await.map_err(Answer::Away)?;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(String, String), Resource>> {
        self.resources
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// By the proxy of the chosen cluster's own `proxy-url`, else by the one that the environment's variables name for its address: the
/// library takes theirs for every address, and `NO_PROXY` to be about the proxy.
async fn of_kubeconfig(
    kubeconfig: Kubeconfig,
    options: &KubeConfigOptions,
) -> anyhow::Result<Config> {
    let own = own_proxy(&kubeconfig, options);
    let mut config = Config::from_custom_kubeconfig(kubeconfig, options).await?;
    let proxy = own.or_else(|| proxy_for(&config.cluster_url));
    config.proxy_url = match proxy {
        Some(proxy) => Some(proxy.parse().context("the proxy's address is none")?),
        None => None,
    };
    Ok(config)
}

fn own_proxy(kubeconfig: &Kubeconfig, options: &KubeConfigOptions) -> Option<String> {
    let chosen = options
        .context
        .as_ref()
        .or(kubeconfig.current_context.as_ref());
    let mut contexts = kubeconfig.contexts.iter();
    let context = contexts.find(|context| Some(&context.name) == chosen)?;
    let name = &context.context.as_ref()?.cluster;
    let cluster = kubeconfig.clusters.iter().find(|it| it.name == *name)?;
    let proxy = cluster.cluster.as_ref()?.proxy_url.clone();
    proxy.filter(|proxy| !proxy.is_empty())
}

/// For one question, which is asked again while it has no good answer; whoever the cluster tells hears of it.
struct Patience<'a> {
    cluster: &'a Cluster,
    begun: Instant,
    pause: Duration,
    said: Option<Instant>,
}

impl Patience<'_> {
    /// Asks once; an error where nothing is answered within the limit.
    async fn ask<T>(&mut self, question: impl Future<Output = T>) -> anyhow::Result<T> {
        let limit = REQUEST_LIMIT.min(self.cluster.unreachable.max(Duration::from_secs(1)));
        let silence = tokio::time::sleep(limit);
        tokio::pin!(question, silence);
        loop {
            tokio::select! {
                biased;
                answer = &mut question => return Ok(answer),
                () = &mut silence => bail!("no answer within {} s", limit.as_secs()),
                () = tokio::time::sleep(WAITING_SAID_EVERY) => self.say("no answer yet"),
            }
        }
    }

    /// Before the next try. An error, of what we cannot do, once the server has been away for as long as the operator allows.
    async fn wait(&mut self, what: &str, error: anyhow::Error) -> anyhow::Result<()> {
        let Cluster {
            server,
            unreachable,
            ..
        } = self.cluster;
        let waited = self.begun.elapsed();
        if waited + self.pause > *unreachable {
            let seconds = waited.as_secs();
            return Err(error.context(format!(
                "cannot {what}: no good answer from the cluster at {server} for {seconds} s"
            )));
        }
        self.say(&format!("{error:#}"));
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        Ok(())
    }

    fn say(&mut self, why: &str) {
        let waited = self.begun.elapsed();
        let is_due = self.said.map_or(waited >= WAITING_SAID_AFTER, |said| {
            said.elapsed() >= WAITING_SAID_EVERY
        });
        if is_due {
            self.said = Some(Instant::now());
            let Cluster { server, tell, .. } = self.cluster;
            let seconds = waited.as_secs();
            tell(format!(
                "waiting for the cluster at {server}, since {seconds} s: {why}"
            ));
        }
    }
}

/// In the server's own words, or the network's. Of a kubeconfig's own command neither what it was given nor what it printed:
/// both may hold a secret. Where it is run for a request, the layers of the client hold its error.
fn plain(error: kube::Error) -> anyhow::Error {
    if let kube::Error::Api(status) = error {
        let Status {
            code,
            reason,
            message,
            ..
        } = *status;
        return match message.is_empty() {
            true => anyhow!("{code} {reason}"),
            false => anyhow!("{message}"),
        };
    }
    let error = anyhow::Error::new(error);
    let of_command = error.chain().find_map(|layer| match layer.downcast_ref() {
        Some(AuthError::AuthExecRun { out, .. }) => Some(out.status),
        _ => None,
    });
    match of_command {
        Some(status) => anyhow!("the kubeconfig's own command failed: {status}"),
        None => words::of_the_network(error),
    }
}

/// Whether the same request can have another answer in a moment.
fn is_transient(status: &Status) -> bool {
    // A field that the schema does not know comes as 500 from some servers.
    (status.code == 429 || status.code >= 500) && !refusal::is_about_schema(&status.message)
}

impl Resource {
    /// A kind that every cluster has.
    pub fn built_in(version: &str, kind: &str, plural: &str, namespaced: bool) -> Self {
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        Self {
            api: ApiResource::from_gvk_with_plural(
                &GroupVersionKind::gvk(group, version, kind),
                plural,
            ),
            namespaced,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_kubeconfigs_command_is_given_and_prints_is_in_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kubeconfig");
        let user = serde_json::json!({"exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": "sh",
            "args": ["-c", "echo a-printed-token; exit 3"],
            "env": [{"name": "KEY", "value": "a-given-key"}],
            "interactiveMode": "Never",
        }});
        let config = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": "https://127.0.0.1:1"}}],
            "users": [{"name": "here", "user": user}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "here"}}],
        });
        std::fs::write(&path, config.to_string()).unwrap();
        let environment = Environment::of_person("here", Some(path), None, "here".to_owned());
        let error = Cluster::connect(&environment).await.err().unwrap();
        let told = format!("{error:#} {error:?}");
        assert!(
            told.contains("own command failed: exit status: 3"),
            "{told}"
        );
        assert!(
            !told.contains("a-printed-token") && !told.contains("a-given-key"),
            "{told}"
        );
    }
}
