//! Requests to pods and Services through the API server: no NodePort and no route into the cluster is needed.
//!
//! What the program answered is told from what the API server says by itself: only the former is an answer. Where the API server
//! may not ask a pod, or has no route to it, its node does, by a port-forward.

use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Pod, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{ListParams, Portforwarder};
use kube::client::Body;

use super::{Cluster, snapshot};

/// One request, connecting and body included.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// For the API server to say anything at all.
const SIGHT_LIMIT: Duration = Duration::from_secs(3);
/// Of the pods behind a Service.
const FORWARDS_MAX: usize = 3;
/// More of a body is not looked at.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;

/// What the program answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// At most `BODY_BYTES_MAX`.
    pub body: Vec<u8>,
    pub took: Duration,
    /// Not on the way that was asked for, but by a port-forward.
    pub forwarded: bool,
}

/// What came of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    Answered(Answer),
    /// The Service leads to no pod that is ready.
    NoEndpoints,
    /// The pod is reached, but nobody there takes the request.
    NobodyThere(String),
    /// The API server does not reach the pod, or not yet know that it is gone; that says nothing about the program.
    Unreached(String),
    /// The pod that was asked is no more.
    Gone,
    /// The API server does not answer, or could not pass it on for reasons of its own.
    Blind(String),
    /// We may not ask at all.
    Forbidden(String),
}

/// Where to ask: `pods` or `services`, its name, and its port's number or name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub resource: &'static str,
    pub name: String,
    pub port: String,
    pub tls: bool,
    /// Whom a port-forward asks in its stead: names of pods, and the port there.
    pods: Vec<(String, u16)>,
}

impl Place {
    /// The Service itself, at its port named `http` or its first.
    pub fn of_service(service: &Service) -> Self {
        let none = || ServicePort {
            port: 80,
            ..ServicePort::default()
        };
        Self::of_service_port(service, &port(service).unwrap_or_else(none))
    }

    /// The Service itself, at one of its ports.
    pub fn of_service_port(service: &Service, port: &ServicePort) -> Self {
        Self {
            resource: "services",
            name: service.metadata.name.clone().unwrap_or_default(),
            // By its name: of two ports with one number, for TCP and UDP, the API server takes the first.
            port: port.name.clone().unwrap_or_else(|| port.port.to_string()),
            tls: speaks_tls(port),
            pods: Vec::new(),
        }
    }

    /// The same, with pods to which it leads: a port-forward reaches no Service.
    #[must_use]
    pub fn by_way_of(mut self, pods: impl IntoIterator<Item = Self>) -> Self {
        self.pods = pods.into_iter().flat_map(|place| place.pods).collect();
        self
    }

    /// Where that port of the Service leads in this pod.
    pub fn of_pod(service: &Service, pod: &Pod) -> Self {
        let (number, tls) = match port(service) {
            None => (80, false),
            Some(port) => {
                let tls = speaks_tls(&port);
                let number = match port.target_port {
                    Some(IntOrString::Int(number)) if number > 0 => number,
                    Some(IntOrString::String(name)) => named_port(pod, &name).unwrap_or(port.port),
                    _ => port.port,
                };
                (number, tls)
            }
        };
        Self::of_pod_port(pod, number, tls)
    }

    /// One of a pod's own ports.
    pub fn of_pod_port(pod: &Pod, number: i32, tls: bool) -> Self {
        let name = snapshot::name(pod).to_owned();
        let forwarded = u16::try_from(number).ok();
        Self {
            resource: "pods",
            port: number.to_string(),
            tls,
            pods: forwarded
                .map(|port| (name.clone(), port))
                .into_iter()
                .collect(),
            name,
        }
    }
}

/// The Service's port to ask.
fn port(service: &Service) -> Option<ServicePort> {
    let ports = service.spec.as_ref()?.ports.clone().unwrap_or_default();
    let mut named = ports.iter();
    let http = named.find(|port| port.name.as_deref() == Some("http"));
    http.or(ports.first()).cloned()
}

fn speaks_tls(port: &ServicePort) -> bool {
    port.name.as_deref() == Some("https")
        || port.app_protocol.as_deref() == Some("https")
        || port.port == 443
}

fn named_port(pod: &Pod, name: &str) -> Option<i32> {
    let containers = &pod.spec.as_ref()?.containers;
    let ports = containers
        .iter()
        .flat_map(|container| container.ports.iter().flatten());
    ports
        .into_iter()
        .find(|port| port.name.as_deref() == Some(name))
        .map(|port| port.container_port)
}

/// Whether this may stand after `/proxy`: nothing that leads out of it, for whoever normalises paths on the way.
pub fn is_plain_path(path: &str) -> bool {
    let bare = path.split(['?', '#']).next().unwrap_or_default();
    let decoded = percent_encoding::percent_decode_str(bare).decode_utf8_lossy();
    path.starts_with('/')
        && !path.starts_with("//")
        && !path
            .chars()
            .any(|c| c.is_control() || c.is_whitespace() || c == '\\' || c == '#')
        && path.is_ascii()
        && !decoded.contains('\\')
        && decoded
            .split('/')
            .all(|segment| segment != ".." && segment != ".")
}

/// GETs `path` of a pod or a Service; never follows a redirect.
pub async fn get(cluster: &Cluster, place: &Place, path: &str) -> Asked {
    let asked = get_directly(cluster, place, path).await;
    let is_barred = matches!(asked, Asked::Forbidden(_) | Asked::Unreached(_));
    if is_barred && !place.tls {
        for (pod, port) in place.pods.iter().take(FORWARDS_MAX) {
            let forwarding = get_forwarded(cluster, pod, *port, path);
            let forwarded = tokio::time::timeout(REQUEST_LIMIT, forwarding).await;
            if let Ok(Ok(answer)) = forwarded {
                return answer;
            }
        }
    }
    asked
}

async fn get_directly(cluster: &Cluster, place: &Place, path: &str) -> Asked {
    let begun = Instant::now();
    match tokio::time::timeout(REQUEST_LIMIT, request(cluster, place, path)).await {
        Ok(Ok((status, body))) => judge(status, body, begun.elapsed()),
        Ok(Err(error)) => Asked::Blind(format!("{error:#}")),
        // Who is silent: the program, or the way to it?
        Err(_) => match is_in_sight(cluster).await {
            true => Asked::NobodyThere(format!("no answer within {} s", REQUEST_LIMIT.as_secs())),
            false => Asked::Blind("the API server does not answer".to_owned()),
        },
    }
}

/// Whether the API server itself answers.
pub async fn is_in_sight(cluster: &Cluster) -> bool {
    let few = ListParams::default().limit(1);
    let services = cluster.api::<Service>();
    let asked = tokio::time::timeout(SIGHT_LIMIT, services.list(&few)).await;
    match asked {
        Ok(Ok(_)) => true,
        // A refusal is an answer too; that it is busy is none.
        Ok(Err(kube::Error::Api(status))) => matches!(status.code, 401 | 403),
        _ => false,
    }
}

async fn request(cluster: &Cluster, place: &Place, path: &str) -> anyhow::Result<(u16, Vec<u8>)> {
    let Place {
        resource,
        name,
        port,
        tls,
        ..
    } = place;
    let scheme = if *tls { "https:" } else { "" };
    let uri = format!(
        "/api/v1/namespaces/{}/{resource}/{scheme}{name}:{port}/proxy{path}",
        cluster.namespace
    );
    let request = hyper::Request::get(uri).body(Body::empty())?;
    let response = cluster.client.send(request).await?;
    let status = response.status().as_u16();
    Ok((status, beginning(response.into_body()).await?))
}

/// An error where there is no port-forward to be had: the API server's refusal, a pod that is gone.
async fn get_forwarded(
    cluster: &Cluster,
    pod: &str,
    port: u16,
    path: &str,
) -> anyhow::Result<Asked> {
    let begun = Instant::now();
    let mut forward = Forward(cluster.api::<Pod>().portforward(pod, &[port]).await?);
    let stream = forward.0.take_stream(port).context("no stream")?;
    let refused = forward.0.take_error(port).context("no stream of errors")?;
    let talk = async {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = hyper::Request::get(path)
            .header(hyper::header::HOST, format!("{pod}:{port}"))
            .body(Empty::<Bytes>::new())?;
        let answering = async move {
            let response = sender.send_request(request).await?;
            let status = response.status().as_u16();
            anyhow::Ok((status, beginning(response.into_body()).await?))
        };
        // The connection ends with the one request, and may do so before the answer is read.
        let (answer, _) = tokio::join!(answering, connection);
        answer
    };
    let talked = tokio::select! {
        biased;
        Some(why) = refused => Err(anyhow::anyhow!(why)),
        talked = talk => talked,
    };
    match talked {
        Ok((status, body)) => Ok(Asked::Answered(Answer {
            status,
            body,
            took: begun.elapsed(),
            forwarded: true,
        })),
        // All else may be said by whoever stands in between.
        Err(error) if format!("{error:#}").contains("connection refused") => {
            Ok(Asked::NobodyThere(format!("{error:#}, by a port-forward")))
        }
        Err(error) => Err(error),
    }
}

/// Ends with its owner.
struct Forward(Portforwarder);

impl Drop for Forward {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// At most `BODY_BYTES_MAX` of it.
async fn beginning<B>(mut body: B) -> anyhow::Result<Vec<u8>>
where
    B: hyper::body::Body<Data = Bytes> + Unpin,
    B::Error: std::error::Error + Send + Sync + 'static,
{
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        bytes.extend_from_slice(&data);
        if bytes.len() > BODY_BYTES_MAX {
            bytes.truncate(BODY_BYTES_MAX);
            break;
        }
    }
    Ok(bytes)
}

fn judge(status: u16, body: Vec<u8>, took: Duration) -> Asked {
    match own_words(status, &body) {
        None => Asked::Answered(Answer {
            status,
            body,
            took,
            forwarded: false,
        }),
        Some(told) if told.contains("no endpoints available") => Asked::NoEndpoints,
        Some(told) if status == 401 || status == 403 => Asked::Forbidden(told),
        Some(told) if told.starts_with("pods \"") && told.ends_with("not found") => Asked::Gone,
        Some(told) => match told.split_once("error trying to reach service: ") {
            Some((_, why)) if is_refusal(why) => Asked::NobodyThere(why.to_owned()),
            Some((_, why)) => Asked::Unreached(why.to_owned()),
            None => Asked::Blind(told),
        },
    }
}

/// Whether the pod's own kernel or program turned the request away, by the words of Go's net/http.
fn is_refusal(why: &str) -> bool {
    let refusals = [
        "connection refused",
        "EOF",
        "connection reset",
        "malformed HTTP",
        "server gave HTTP response",
    ];
    refusals.iter().any(|words| why.contains(words))
}

/// What the API server itself said; None where the words are the program's.
fn own_words(status: u16, body: &[u8]) -> Option<String> {
    if status < 400 {
        return None;
    }
    if let Ok(json) = serde_json::from_slice::<serde_json::Value>(body)
        && json.get("kind").and_then(|kind| kind.as_str()) == Some("Status")
        && json.get("apiVersion").and_then(|version| version.as_str()) == Some("v1")
    {
        let message = json
            .get("message")
            .and_then(|message| message.as_str())
            .unwrap_or("no message");
        return Some(message.to_owned());
    }
    let text = String::from_utf8_lossy(body);
    text.trim_start()
        .starts_with("error trying to reach service")
        .then(|| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_api_server_says_is_no_answer_of_the_program() {
        let status = |message: &str| {
            serde_json::json!({"kind": "Status", "apiVersion": "v1", "message": message})
                .to_string()
                .into_bytes()
        };
        let judged = |code, body| judge(code, body, Duration::ZERO);
        assert_eq!(
            judged(503, status("no endpoints available for service \"web\"")),
            Asked::NoEndpoints
        );
        assert!(matches!(
            judged(
                503,
                status(
                    "error trying to reach service: dial tcp 10.0.0.1:80: connect: connection refused"
                )
            ),
            Asked::NobodyThere(_)
        ));
        assert!(matches!(
            judged(
                503,
                status("error trying to reach service: dial tcp 10.0.0.1:80: i/o timeout")
            ),
            Asked::Unreached(_)
        ));
        assert_eq!(judged(404, status("pods \"web-1\" not found")), Asked::Gone);
        assert!(matches!(
            judged(502, b"error trying to reach service: EOF".to_vec()),
            Asked::NobodyThere(_)
        ));
        assert!(matches!(
            judged(403, status("pods \"x\" is forbidden")),
            Asked::Forbidden(_)
        ));
        assert!(matches!(
            judged(500, status("etcdserver: request timed out")),
            Asked::Blind(_)
        ));
        assert!(matches!(
            judged(503, b"warming up".to_vec()),
            Asked::Answered(_)
        ));
        assert!(matches!(
            judged(200, status("I am a program that answers like this")),
            Asked::Answered(_)
        ));
    }

    #[test]
    fn a_path_cannot_lead_out_of_the_proxy() {
        for good in ["/", "/health", "/a/b?c=d&e=..", "/%20", "/..a"] {
            assert!(is_plain_path(good), "{good}");
        }
        for bad in [
            "",
            "health",
            "/../../secrets",
            "/a/%2e%2e/b",
            "/a/%2E./b",
            "//host/",
            "/a b",
            "/a\r\nX: y",
            "/\\..\\x",
            "/.%2e/",
            "/ä",
            "/a#b",
        ] {
            assert!(!is_plain_path(bad), "{bad:?}");
        }
    }
}
