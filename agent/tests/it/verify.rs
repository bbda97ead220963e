//! Verify and smoke test on the real cluster: what stands is shown, what answers wrongly is told, and blindness is no failure.
//! Each way in which a rollout can end has its own test in `verdicts`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use landfall::release::Change;
use landfall::stages::StageError;
use serde_json::json;

use crate::stand::{
    SERVE, Stand, cause, container, deployment, ready_when_it_answers, service, serving,
};
use crate::support::{self, agent_kubeconfig, kubectl};
use crate::verdicts::{claim, daemon, stateful};

#[tokio::test]
async fn a_good_rollout_is_complete_shown_and_answers() {
    let mut stand = Stand::new("good", serving);
    let rolled_out = stand.verify().await.unwrap();
    assert_eq!(
        rolled_out.revisions,
        [("deployment/web".to_owned(), "1".to_owned())]
    );
    let tests = json!([
        {"get": "/", "service": "web", "expect": {"status": 200, "json": {"status": "healthy", "commit": "$commit"}}},
        {"get": "/index.html?a=b", "service": "web", "expect": {"body_contains": "healthy"}},
    ]);
    let live = stand.smoke_test(tests, 3).await.unwrap();
    assert!(
        live.requests >= 2 * (2 + 3),
        "two pods and the Service, twice: {}",
        live.requests
    );
    let log = stand.log().await;
    for line in [
        "deployment/web successfully rolled out",
        "NAME",
        "UP-TO-DATE",
        "CLUSTER-IP",
        "REVISION",
        "2/2",
        "GET / of service/web: 200 in ",
        "Soak: 3 s",
    ] {
        assert!(log.contains(line), "{line} is missing in {log}");
    }
}

#[tokio::test]
async fn a_claim_that_no_pod_uses_is_told_of_and_fails_nothing() {
    let stand = Stand::new("unused", |ns| [serving(ns), vec![claim(ns)]].concat());
    stand.verify().await.unwrap();
    let log = stand.log().await;
    let told = "persistentvolumeclaim/data is not bound, and no pod of this release waits for it";
    assert!(log.contains(told), "{log}");
}

#[tokio::test]
async fn what_the_apply_left_as_it_was_is_verified_all_the_same() {
    let stand = Stand::new("unchanged", serving);
    stand.verify().await.unwrap();
    let mut applied = stand.apply();
    applied
        .objects
        .iter_mut()
        .for_each(|object| object.change = Change::Unchanged);
    let begun = Instant::now();
    stand.verify_applied(&applied).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(stand.log().await.contains("changed nothing"));
}

#[tokio::test]
async fn the_previous_release_stays_while_the_new_one_dies() {
    let mut stand = Stand::new("second", serving);
    stand.verify().await.unwrap();
    let dying = &mut stand.release.objects[1];
    container(dying)["command"] = json!(["sh", "-c", "exit 3"]);
    dying["spec"]["template"]["metadata"]["annotations"]["landfall.dev/release"] = json!("bbbb");
    assert_eq!(cause(stand.verify().await).id, "crash_loop");
    let ready = kubectl(&[
        "-n",
        &stand.namespace.0,
        "get",
        "deployment",
        "web",
        "-o",
        "jsonpath={.status.readyReplicas}",
    ]);
    assert!(ready == "1" || ready == "2", "{ready}");
}

/// The controller tries a refused pod again after about as long as it has tried: by then an old pod has long made room.
#[tokio::test]
async fn a_quota_that_holds_one_pod_back_until_an_old_one_has_left_fails_nothing() {
    let leaves_late = format!("trap '' TERM; {}", SERVE.replace("exec httpd", "httpd"));
    let replicas = |ns: &str, release: &str| {
        let mut web = deployment(ns, 2, &leaves_late);
        ready_when_it_answers(&mut web);
        web["spec"]["strategy"] = json!({"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 1}});
        let template = &mut web["spec"]["template"];
        template["metadata"]["annotations"]["landfall.dev/release"] = json!(release);
        template["spec"]["terminationGracePeriodSeconds"] = json!(6);
        web
    };
    let quota = |ns: &str| {
        json!({"apiVersion": "v1", "kind": "ResourceQuota",
            "metadata": {"name": "few", "namespace": ns}, "spec": {"hard": {"pods": "2"}}})
    };
    let mut stand = Stand::new("tight", |ns| vec![quota(ns), replicas(ns, "aaaa")]);
    stand.verify().await.unwrap();
    stand.release.objects[1] = replicas(&stand.namespace.0, "bbbb");
    let ended = stand.verify().await;
    let log = stand.log().await;
    assert!(ended.is_ok(), "{ended:?}\n{log}");
    assert!(log.contains("exceeded quota: few"), "{log}");
}

#[tokio::test]
async fn each_wrong_answer_fails_the_smoke_test_with_its_cause() {
    let mut stand = Stand::new("wrong", serving);
    stand.verify().await.unwrap();
    for (test, id, says) in [
        (
            json!({"get": "/nothing"}),
            "smoke_wrong_status",
            "answered 404 and not 200",
        ),
        (
            json!({"get": "/", "expect": {"body_contains": "Guten Tag"}}),
            "smoke_wrong_body",
            "Guten Tag",
        ),
        (
            json!({"get": "/", "expect": {"json": {"commit": "not $commit"}}}),
            "smoke_wrong_version",
            "not 0123456789ab",
        ),
        (json!({"get": "/../../../secrets"}), "smoke_path", "no path"),
        (
            json!({"url": "http://169.254.169.254/"}),
            "smoke_host_not_allowed",
            "169.254.169.254",
        ),
        (
            json!({"url": "http://127.0.0.1:1/", "timeout_seconds": 1}),
            "smoke_no_answer",
            "127.0.0.1:1",
        ),
    ] {
        let mut test = test;
        if test.get("get").is_some() {
            test["service"] = json!("web");
        }
        let begun = Instant::now();
        let cause = cause(stand.smoke_test(json!([test]), 0).await);
        assert_eq!(cause.id, id, "{cause:?}");
        assert!(cause.sentence.contains(says), "{cause:?}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{cause:?}");
    }
    stand.log().await;
}

#[tokio::test]
async fn where_the_api_server_may_not_ask_pods_their_node_does() {
    let mut stand = Stand::new("forwarded", serving);
    stand.verify().await.unwrap();
    let namespace = stand.namespace.0.clone();
    let own = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(own.path(), agent_kubeconfig(&namespace)).unwrap();
    stand.environment.kubeconfig = Some(own.path().to_owned());
    let of_agent =
        format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles/landfall-agent");
    change(&of_agent, |role| {
        let rules = role["rules"].as_array_mut().unwrap();
        rules.retain(|rule| !rule["resources"].to_string().contains("/proxy"));
    });
    let good = json!({"get": "/", "service": "web", "expect": {"json": {"status": "healthy"}}});
    stand.smoke_test(json!([good]), 0).await.unwrap();
    let log = stand.log().await;
    for who in ["GET / of pod web-", "GET / of service/web: 200 in "] {
        let line = log.lines().find(|line| line.starts_with(who));
        assert!(
            line.is_some_and(|line| line.ends_with(", by a port-forward")),
            "{log}"
        );
    }
    let missing = json!({"get": "/nothing", "service": "web"});
    let wrong = cause(stand.smoke_test(json!([missing]), 0).await);
    assert_eq!(wrong.id, "smoke_wrong_status", "{wrong:?}");

    change(
        &format!("/api/v1/namespaces/{namespace}/services/web"),
        |web| {
            web["spec"]["ports"][0]["targetPort"] = json!(81);
        },
    );
    let nobody = json!({"get": "/", "service": "web", "timeout_seconds": 2});
    let wrong = cause(stand.smoke_test(json!([nobody]), 0).await);
    assert!(
        wrong.id == "smoke_no_answer" && wrong.sentence.contains("refused"),
        "{wrong:?}"
    );
}

/// As the cluster's admin.
fn change(path: &str, how: impl FnOnce(&mut serde_json::Value)) {
    let live = support::api("GET", path, None).unwrap();
    let mut object = serde_json::from_str(&live).unwrap();
    how(&mut object);
    support::api("PUT", path, Some(&object)).unwrap();
}

#[tokio::test]
async fn a_service_that_leads_nowhere_fails_the_smoke_test() {
    let mut stand = Stand::new("nowhere", |namespace| {
        vec![service(namespace, "other"), deployment(namespace, 1, SERVE)]
    });
    stand.verify().await.unwrap();
    let nowhere = cause(
        stand
            .smoke_test(json!([{"get": "/", "service": "web"}]), 0)
            .await,
    );
    assert_eq!(nowhere.id, "smoke_no_endpoint");
    assert!(
        nowhere.sentence.contains("selects app=other"),
        "{nowhere:?}"
    );
    let missing = cause(
        stand
            .smoke_test(json!([{"get": "/", "service": "nosuch"}]), 0)
            .await,
    );
    assert_eq!(missing.sentence, "service/nosuch does not exist");
}

#[tokio::test]
async fn a_port_where_nobody_listens_fails_the_smoke_test() {
    let mut stand = Stand::new("deaf", |namespace| {
        vec![
            service(namespace, "web"),
            deployment(namespace, 1, "sleep 600"),
        ]
    });
    stand.verify().await.unwrap();
    let cause = cause(
        stand
            .smoke_test(
                json!([{"get": "/", "service": "web", "timeout_seconds": 3}]),
                0,
            )
            .await,
    );
    stand.log().await;
    assert_eq!(cause.id, "smoke_no_answer", "{cause:?}");
}

#[tokio::test]
async fn a_service_that_no_smoke_test_asks_must_lead_to_somebody_who_listens() {
    // It listens, and speaks no HTTP.
    let speaks = "while true; do echo -ERR | nc -l -p 6379; done";
    let mut stand = Stand::new("listens", |namespace| {
        let named = |name: &str, ports: serde_json::Value| {
            let mut service = service(namespace, "web");
            service["metadata"]["name"] = json!(name);
            service["spec"]["ports"] = ports;
            service
        };
        let redis = json!({"name": "redis", "port": 6379});
        let spare = json!({"name": "spare", "port": 9999});
        vec![
            named("redis", json!([redis])),
            named("half", json!([redis, spare])),
            named("later", json!([spare])),
            deployment(namespace, 1, speaks),
        ]
    });
    stand.verify().await.unwrap();
    let later = stand.release.objects.remove(2);
    stand.listens().await.unwrap();
    stand.release.objects.push(later);
    let cause = cause(stand.listens().await);
    assert_eq!(cause.id, "smoke_no_answer", "{cause:?}");
    assert!(
        cause.sentence.contains("service/later") && cause.sentence.contains("9999"),
        "{cause:?}"
    );
    let log = stand.log().await;
    let told = "nobody listens where port 9999 of service/half leads";
    assert!(log.contains(told), "{log}");
}

#[tokio::test]
async fn a_program_that_moves_its_port_under_an_unchanged_service_is_found() {
    let mut stand = Stand::new("moves", |namespace| {
        let mut dead = service(namespace, "web");
        dead["metadata"]["name"] = json!("dead");
        dead["spec"]["ports"] = json!([{"port": 80, "targetPort": 9}]);
        vec![
            service(namespace, "web"),
            dead,
            deployment(namespace, 1, SERVE),
        ]
    });
    stand.verify().await.unwrap();
    let heard = stand.heard().await;
    assert_eq!(heard.iter().collect::<Vec<_>>(), ["web"]);
    stand.still_listens(&heard).await.unwrap();
    let moved = SERVE.replace("8080", "9090");
    stand.release.objects[2] = deployment(&stand.namespace.0.clone(), 1, &moved);
    stand.verify().await.unwrap();
    stand.release.verify.timeout_seconds = 30;
    let cause = cause(stand.still_listens(&heard).await);
    assert_eq!(cause.id, "smoke_no_answer", "{cause:?}");
    assert!(cause.sentence.contains("service/web"), "{cause:?}");
}

#[tokio::test]
async fn a_program_that_dies_after_the_smoke_test_fails_in_the_soak() {
    let shell = "(sleep 14; echo 'panicked at the wrong moment'; kill -9 -1) & mkdir /tmp/www; httpd -f -p 8080 -h /tmp/www; exit 3";
    let mut stand = Stand::new("soak", |namespace| {
        let mut deployment = deployment(namespace, 1, shell);
        container(&mut deployment)["command"] = json!(["sh", "-c", format!("{{ {shell}; }}")]);
        vec![service(namespace, "web"), deployment]
    });
    stand.verify().await.unwrap();
    let soaked = stand
        .smoke_test(
            json!([{"get": "/", "service": "web", "expect": {"status": 404}}]),
            40,
        )
        .await;
    stand.log().await;
    let cause = cause(soaked);
    assert_eq!(cause.id, "crash_in_soak", "{cause:?}");
    assert!(
        cause.sentence.contains("panicked at the wrong moment"),
        "{cause:?}"
    );
}

#[tokio::test]
async fn a_pod_that_loses_its_readiness_fails_the_soak() {
    let mut stand = Stand::new("unready", serving);
    stand.verify().await.unwrap();
    let breaking = stand.at("Soak: watching for 40 s", |namespace| {
        let remove = ["rm", "/tmp/www/index.html"];
        kubectl(
            &[
                &["-n", namespace, "exec", "deployment/web", "--"],
                &remove[..],
            ]
            .concat(),
        );
    });
    let soaked = stand
        .smoke_test(json!([{"get": "/", "service": "web"}]), 40)
        .await;
    breaking.await.unwrap();
    let cause = cause(soaked);
    assert_eq!(cause.id, "crash_in_soak", "{cause:?}");
    assert!(
        cause
            .sentence
            .contains("lost its readiness after the smoke test")
            && cause.sentence.contains("404"),
        "{cause:?}"
    );
}

#[tokio::test]
async fn a_cancel_cuts_the_soak_short_and_the_release_stays_live() {
    let mut stand = Stand::new("cut", serving);
    stand.verify().await.unwrap();
    let canceler = stand.cancel_at("Soak: watching for 300 s");
    let begun = Instant::now();
    stand
        .smoke_test(json!([{"get": "/", "service": "web"}]), 300)
        .await
        .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(60));
    canceler.await.unwrap();
    assert!(stand.log().await.contains("cut short"));
}

#[tokio::test]
async fn pods_that_are_taken_away_in_the_soak_are_no_fault_of_the_release() {
    let mut stand = Stand::new("taken", serving);
    stand.verify().await.unwrap();
    let taking = stand.at("Soak: watching for 15 s", |namespace| {
        let names = kubectl(&["-n", namespace, "get", "pods", "-o", "name"]);
        let names: Vec<&str> = names.lines().collect();
        kubectl(&["-n", namespace, "delete", "--wait=false", names[0]]);
        // As `kubectl drain` does it.
        let name = names[1].strip_prefix("pod/").unwrap();
        let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": namespace}});
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/eviction");
        support::api("POST", &path, Some(&eviction)).unwrap();
    });
    stand
        .smoke_test(json!([{"get": "/", "service": "web"}]), 15)
        .await
        .unwrap();
    taking.await.unwrap();
    assert!(stand.log().await.contains("15 s without a restart"));
}

#[tokio::test]
async fn what_another_deletes_or_changes_in_the_soak_is_said() {
    let image = json!({"spec": {"template": {"spec": {"containers": [{"name": "app", "image": "localhost:1/other:1"}]}}}});
    for (name, says) in [("deleted", "was deleted"), ("changed", "was changed")] {
        let mut stand = Stand::new(name, serving);
        let rolled_out = stand.verify().await.unwrap();
        let patch = image.to_string();
        let meddling = stand.at("Soak: watching for 60 s", move |namespace| {
            let web = ["-n", namespace, "patch", "deployment", "web", "-p", &patch];
            match name {
                "deleted" => kubectl(&["-n", namespace, "delete", "deployment", "web"]),
                _ => kubectl(&web),
            };
        });
        let tests = json!([{"get": "/", "service": "web"}]);
        let cause = cause(stand.smoke_test_after(&rolled_out, tests, 60).await);
        meddling.await.unwrap();
        assert_eq!(cause.id, "changed_by_another", "{cause:?}");
        assert!(cause.sentence.contains(says), "{cause:?}");
    }
}

#[tokio::test]
async fn pods_that_a_partition_holds_back_fail_no_smoke_test() {
    let mut stand = Stand::new("partition", |ns| {
        let before = SERVE.replace(support::COMMIT, "another");
        vec![service(ns, "web"), stateful(ns, 3, 2, &before)]
    });
    stand.verify().await.unwrap();
    let template = &mut stand.release.objects[1]["spec"]["template"];
    template["metadata"]["annotations"]["landfall.dev/release"] = json!("bbbb");
    template["spec"]["containers"][0]["command"][2] = json!(SERVE);
    stand.verify().await.unwrap();
    let commit = json!({"json": {"commit": "$commit"}});
    let tests = json!([
        {"get": "/", "service": "web", "timeout_seconds": 10},
        {"get": "/index.html", "service": "web", "timeout_seconds": 10, "expect": commit},
    ]);
    stand.smoke_test(tests, 0).await.unwrap();
    let log = stand.log().await;
    for path in ["/", "/index.html"] {
        let of_new = format!("GET {path} of pod db-2: 200");
        let of_old = format!("GET {path} of pod db-1");
        assert!(log.contains(&of_new) && !log.contains(&of_old), "{log}");
    }
    assert!(log.contains("GET / of service/web: 200"), "{log}");
    assert!(
        log.contains("GET /index.html of service/web: not asked for its commit"),
        "{log}"
    );
}

#[tokio::test]
async fn a_workload_of_no_pods_beside_another_is_not_asked() {
    let mut stand = Stand::new("nopods", |ns| {
        vec![
            service(ns, "web"),
            deployment(ns, 0, SERVE),
            daemon(ns, SERVE),
        ]
    });
    let template = &mut stand.release.objects[2]["spec"];
    template["selector"]["matchLabels"]["app"] = json!("agent");
    template["template"]["metadata"]["labels"]["app"] = json!("agent");
    stand.verify().await.unwrap();
    let tests = json!([{"get": "/", "service": "web", "timeout_seconds": 5}]);
    stand.smoke_test(tests, 0).await.unwrap();
    let log = stand.log().await;
    assert!(log.contains("no pod is wanted behind it"), "{log}");
}

/// Stands before the API server: it has forgotten every watch (410), and every third request comes too soon for it (429).
struct BusyServer {
    url: String,
    forgotten: AtomicUsize,
    asked: AtomicUsize,
}

impl BusyServer {
    async fn start() -> Arc<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Arc::new(Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            forgotten: AtomicUsize::new(0),
            asked: AtomicUsize::new(0),
        });
        let client = support::admin().await;
        let router = axum::Router::new().fallback({
            let server = server.clone();
            move |request| server.clone().answer(client.clone(), request)
        });
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        server
    }

    async fn answer(self: Arc<Self>, client: kube::Client, request: Request) -> Response {
        let query = request.uri().query().unwrap_or_default();
        if query.contains("watch=") {
            self.forgotten.fetch_add(1, Ordering::Relaxed);
            return refusal(StatusCode::GONE, "Expired");
        }
        if self.asked.fetch_add(1, Ordering::Relaxed) % 3 == 2 {
            return refusal(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests");
        }
        let (mut parts, body) = request.into_parts();
        parts.headers.remove("host");
        let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        let request = axum::http::Request::from_parts(parts, body.to_vec().into());
        let answer = client.send(request).await.unwrap();
        answer.map(Body::new).into_response()
    }
}

fn refusal(status: StatusCode, reason: &str) -> Response {
    let said = json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": reason, "code": status.as_u16()});
    (status, [("retry-after", "1")], axum::Json(said)).into_response()
}

#[tokio::test]
async fn a_server_that_is_busy_and_forgets_its_watches_fails_nothing() {
    let server = BusyServer::start().await;
    let mut stand = Stand::new("busy", |namespace| {
        let mut deployment = deployment(namespace, 2, &format!("sleep 8; {SERVE}"));
        ready_when_it_answers(&mut deployment);
        vec![deployment]
    });
    let applied = stand.apply();
    let file = kubeconfig_of(&server.url);
    stand.environment.kubeconfig = Some(file.path().to_path_buf());
    stand.verify_applied(&applied).await.unwrap();
    let told = stand.log().await;
    assert!(
        told.contains("deployment/web successfully rolled out"),
        "{told}"
    );
    assert!(server.forgotten.load(Ordering::Relaxed) > 0);
    assert!(server.asked.load(Ordering::Relaxed) > 3);
}

/// Of a server that asks nobody who they are.
fn kubeconfig_of(server: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
    let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": server}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}], "users": [{"name": "x", "user": {}}]});
    std::fs::write(file.path(), config.to_string()).unwrap();
    file
}

#[tokio::test]
async fn a_cluster_out_of_sight_is_never_a_failure_of_the_release() {
    let mut stand = Stand::new("blind", |namespace| vec![deployment(namespace, 1, SERVE)]);
    let applied = stand.apply();
    let file = kubeconfig_of("http://127.0.0.1:1");
    stand.environment.kubeconfig = Some(file.path().to_path_buf());
    stand.environment.limits.unreachable_seconds = 3;
    let error = stand.verify_applied(&applied).await.unwrap_err();
    let StageError::Agent(error) = error else {
        panic!("{error:?}")
    };
    assert!(
        format!("{error:#}").starts_with("cannot see the cluster for 3 s"),
        "{error:#}"
    );
}

#[tokio::test]
async fn a_canceled_verify_ends_at_once() {
    let stand = Stand::new("cancel", |namespace| {
        let mut deployment = deployment(namespace, 1, "sleep 600");
        ready_when_it_answers(&mut deployment);
        vec![deployment]
    });
    let canceler = stand.cancel_at("0 of 1 new pods ready");
    let begun = Instant::now();
    assert!(matches!(stand.verify().await, Err(StageError::Canceled)));
    assert!(begun.elapsed() < Duration::from_secs(10));
    canceler.await.unwrap();
}

/// What was shown is as far as it got; the agent's own login is at fault.
#[tokio::test]
async fn a_login_that_ends_midway_is_not_the_releases_fault() {
    let mut stand = Stand::new("login", |namespace| {
        let mut deployment = deployment(namespace, 1, "sleep 600");
        ready_when_it_answers(&mut deployment);
        vec![deployment]
    });
    let applied = stand.apply();
    let file = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
    std::fs::write(file.path(), agent_kubeconfig(&stand.namespace.0)).unwrap();
    stand.environment.kubeconfig = Some(file.path().to_path_buf());
    let revoking = stand.at("0 of 1 new pods ready", |namespace| {
        kubectl(&["-n", "landfall-agents", "delete", "secret", namespace]);
    });
    let begun = Instant::now();
    let ended = stand.verify_applied(&applied).await;
    revoking.await.unwrap();
    let Err(StageError::Agent(error)) = ended else {
        panic!("{ended:?}")
    };
    let error = format!("{error:#}");
    assert!(
        error.starts_with("cannot see the cluster: ") && error.contains("Unauthorized"),
        "{error}"
    );
    assert!(begun.elapsed() < Duration::from_secs(30));
}
