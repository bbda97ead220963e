//! The trial: pushes come, some late, and the agent is killed after durable writes and effects outside, at one fail point after
//! the other, again while it recovers and while it rolls back. Then what everybody saw is read against the promises.
//!
//! Recorded are: what was pushed and answered, each state of the Deployment as a watch told it, what GitHub's fake was shown,
//! and in the end the store. The tests named p1 to p10 read that record and nothing else; each failure prints the seed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::fake_github::{FakeGithub, TOKEN};
use crate::landfall::{BRANCH, Landfall, all_builds, is_terminal};
use crate::postgres::Postgres;
use crate::soak::{keep, number};
use crate::support::{eventually, kubectl_command};

/// How long a round lasts where its fail point is not passed; then the agent is killed all the same.
const ROUND_MAX: Duration = Duration::from_secs(12);
/// Longer than between two looks at the branch, and than GitHub is told in.
const REST: Duration = Duration::from_secs(4);
/// Among the points that are passed in one build.
const ANY_POINT_MAX: usize = 40;
/// For everything to come to its end after the last kill.
const END_MAX: Duration = Duration::from_secs(120);
/// Of a debug build, less the binary itself; at the end of long runs it had 15 to 50 MiB.
const ANONYMOUS_MAX: u64 = 64 << 20;
/// For GitHub to know all of it, however long it was told nothing.
const TOLD_MAX: Duration = Duration::from_mins(5);

/// One state of the Deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    commit: String,
    fence: i64,
}

#[derive(Debug, Default)]
struct History {
    seed: u64,
    /// Every commit in the order of the branch, and whether its program runs.
    commits: Vec<(String, bool)>,
    /// A delivery that GitHub has not sent yet.
    late: Option<(String, Value)>,
    /// Answers of 202: commit and build.
    accepted: Vec<(String, i64)>,
    seen: Vec<Seen>,
    builds: Vec<Value>,
    /// Releases as they served, the newest first.
    served: Vec<Value>,
    /// What GitHub was shown of each commit.
    shown: HashMap<String, Vec<String>>,
    /// What a person asked for and was answered well, and how often.
    asked: BTreeMap<String, usize>,
    /// An undo or a pin may hold the environment.
    may_be_held: bool,
    /// How often the agent died at each point, or because the round was over ("the clock").
    kills: BTreeMap<String, usize>,
    /// From the last start to the end of the last build.
    ended_after: Duration,
    /// Containers, images and folders of builds that have ended.
    orphans: Vec<String>,
    anonymous_bytes: u64,
}

/// A small generator of its own: the seed is all that is needed to have the same turns again.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

/// The names of all fail points, as the sources have them.
fn points() -> Vec<String> {
    let mut points = HashSet::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(path).unwrap();
            let named = text.split("fail_point::at(\"").skip(1);
            let named = named.map(|rest| rest.split('"').next().unwrap());
            // What serving does not do, or once for an environment, has tests of its own.
            let is_here = |name: &&str| !name.starts_with("restore: ") && *name != "store: adopt";
            points.extend(named.filter(is_here).map(str::to_owned));
        }
    }
    let mut points: Vec<_> = points.into_iter().collect();
    points.sort();
    assert!(points.len() > 30, "{points:?}");
    points
}

/// `TRIAL_KILLS` of them and for at least `TRIAL_SECONDS`; `TRIAL_SEED` to have the same turns again.
async fn run(name: &str, database: Option<&str>) -> History {
    let seed = u64::try_from(number("TRIAL_SEED", 7)).unwrap();
    // Each store has turns of its own.
    let mut random = Random(seed + u64::try_from(name.len()).unwrap());
    let github = FakeGithub::start().await;
    let mut landfall = Landfall::start(name).await;
    let more = format!(
        "reconcile_seconds: 2\ngithub: {{ api_url: \"{}\", token: {TOKEN} }}\n{}environments:",
        github.url(),
        database.map_or(String::new(), |url| format!("database: \"{url}\"\n")),
    );
    landfall.restart("environments:", &more, &[]).await;
    let mut history = History {
        seed,
        ..History::default()
    };
    let seen = watch(&landfall.namespace.0);
    // What served before anything goes wrong.
    let first = push(&mut landfall, &mut history, true, false).await;
    landfall.end(first.expect("the agent runs")).await;

    let mut points = points();
    let kills = number("TRIAL_KILLS", 60);
    let until = Instant::now() + Duration::from_secs(number("TRIAL_SECONDS", 0) as u64);
    landfall.kill();
    let mut is_idle = true;
    for round in 0.. {
        if round >= kills && Instant::now() >= until {
            break;
        }
        // In turns one of those that were not wanted for longest, and any.
        let wanted = (round % 3 == 0).then(|| {
            let point = points.remove(random.below(points.len() / 2));
            points.push(point.clone());
            point
        });
        let fail_point = match &wanted {
            Some(point) => format!("{point}:1"),
            None => format!("*:{}", 1 + random.below(ANY_POINT_MAX)),
        };
        let passed_before = landfall.fail_points().len();
        landfall.run_doomed(&[("LANDFALL_FAIL_POINT", &fail_point)]);
        let begun = Instant::now();
        if random.below(3) == 0 || is_idle {
            // One in four is a program that ends at once.
            let is_good = random.below(4) > 0;
            let is_late = random.below(5) == 0;
            push(&mut landfall, &mut history, is_good, is_late).await;
        }
        let is_stopped =
            a_person_acts(&mut landfall, &mut history, &mut random, wanted.as_deref()).await;
        let died = dies_or_rests(&mut landfall, begun + ROUND_MAX).await;
        is_idle = !died;
        let mut passed = landfall.fail_points();
        let by = match (passed.len() > passed_before, died && is_stopped) {
            (true, _) => passed.pop().unwrap(),
            (false, true) => "a stop by SIGTERM".to_owned(),
            (false, false) => "the clock".to_owned(),
        };
        *history.kills.entry(by).or_default() += 1;
    }

    let begun = Instant::now();
    landfall.run().await;
    landfall
        .write("/api/environments/hello/unpin", json!({}))
        .await;
    push(&mut landfall, &mut history, true, false).await;
    let head = history.commits.last().unwrap().0.clone();
    eventually("all builds end, and the head serves", END_MAX, async || {
        let builds = all_builds(&landfall.url("")).await;
        let ended = builds.iter().all(is_terminal);
        let is_there = builds.iter().any(|build| build["commit"] == head.as_str());
        (ended && is_there).then_some(())
    })
    .await;
    history.ended_after = begun.elapsed();
    history.builds = all_builds(&landfall.url("")).await;
    history.served = history_of(&landfall).await;
    history.anonymous_bytes = landfall.anonymous_bytes();
    // The promise is a minute.
    let swept = Instant::now();
    loop {
        history.orphans = orphans(&landfall, &history);
        if history.orphans.is_empty() || swept.elapsed() > Duration::from_secs(70) {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let told = async || {
        let shown = |commit: &String| (commit.clone(), github.states(commit, "landfall/hello"));
        let of_all: HashMap<_, _> = history
            .commits
            .iter()
            .map(|(commit, _)| shown(commit))
            .collect();
        let last = of_all.get(&head).and_then(|states| states.last().cloned());
        let is_over = of_all
            .values()
            .all(|states| states.last().is_none_or(|last| last != "pending"));
        (is_over && last.as_deref() == Some("success")).then_some(of_all)
    };
    history.shown = eventually("GitHub knows the end of all", TOLD_MAX, told).await;
    history.seen.clone_from(&seen.lock().unwrap());
    let never: Vec<&String> = points
        .iter()
        .filter(|point| !history.kills.contains_key(*point))
        .collect();
    let figure = json!({"seed": seed, "kills": history.kills.values().sum::<usize>(), "points": history.kills,
        "points_never_ended_at": never, "asked_by_a_person": history.asked, "anonymous_bytes": history.anonymous_bytes,
        "pushes": history.commits.len(), "builds": history.builds.len(), "ended_after_seconds": history.ended_after.as_secs()});
    keep(&format!("trial_{name}"), &figure);
    history
}

/// Commits and pushes, and delivers as long as the agent lives, unless GitHub `is_late`: then after the next one. The build,
/// where it was answered.
async fn push(
    landfall: &mut Landfall,
    history: &mut History,
    is_good: bool,
    is_late: bool,
) -> Option<i64> {
    let number = history.commits.len();
    let start = match is_good {
        true => "exec httpd -f -p 5000 -h /www\n",
        false => "echo 'no more disk' >&2; exit 3\n",
    };
    let page = format!("Hello {number}\n");
    // Each release makes an object that the one before had not, and removes that one's.
    let beside = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{ name: beside-{} }}\n",
        number % 2
    );
    let files = [
        ("start.sh", start),
        ("www/index.html", &page),
        ("kubernetes/beside.yaml", &beside),
    ];
    let commit = landfall.commit(&files);
    let before = history
        .commits
        .last()
        .map_or(crate::landfall::ZERO.to_owned(), |(last, _)| last.clone());
    history.commits.push((commit.clone(), is_good));
    let payload = crate::landfall::push_payload("acme/hello", "refs/heads/main", &before, &commit);
    if is_late {
        history.late = Some((commit, payload));
        return None;
    }
    let build = deliver(landfall, history, &commit, &payload).await;
    if let Some((commit, payload)) = history.late.take() {
        deliver(landfall, history, &commit, &payload).await;
    }
    build
}

/// Waits until the agent has died; one that lives at `until`, or has had nothing to do for `REST`, is killed. Which of the two.
async fn dies_or_rests(landfall: &mut Landfall, until: Instant) -> bool {
    let mut rests_since = None;
    while landfall.lives() && Instant::now() < until {
        let answer = landfall.request(reqwest::Method::GET, "/api/builds?limit=5");
        let page: Option<Value> = match answer.send().await {
            Ok(answer) => answer.json().await.ok(),
            Err(_) => None,
        };
        let builds = page.as_ref().and_then(|page| page["builds"].as_array());
        if builds.is_some_and(|builds| builds.iter().all(is_terminal)) {
            let since = *rests_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= REST {
                break;
            }
        } else {
            rests_since = None;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    landfall.dies_within(Duration::ZERO).await
}

/// Now and then somebody asks for a build, cancels, goes back or forward, holds the environment or lets it go, or stops the agent:
/// whether that.
/// Always where only that passes the `wanted` fail point.
async fn a_person_acts(
    landfall: &mut Landfall,
    history: &mut History,
    random: &mut Random,
    wanted: Option<&str>,
) -> bool {
    let chance = random.below(20);
    let verb = match (wanted, chance) {
        (Some("store: cancel"), _) | (_, 0) => "cancel",
        (Some("store: bring_back"), _) | (_, 1) => "undo",
        (_, 2) => "redo",
        (Some("store: pin"), _) | (_, 3) => "pin",
        (Some("store: unpin"), _) => "unpin",
        (Some("store: enqueue"), _) | (_, 17) => "builds",
        (Some("store: leave" | "store: hand_over"), _) | (_, 4) => {
            tokio::time::sleep(Duration::from_millis(random.below(3000) as u64)).await;
            if landfall.lives() {
                landfall.ask_to_stop();
            }
            return true;
        }
        // It is not held for long: most pushes are to be deployed.
        (_, 5..17) if history.may_be_held => "unpin",
        _ => return false,
    };
    let path = match (verb, history.accepted.last()) {
        ("cancel", Some((_, build))) => format!("/api/builds/{build}/cancel"),
        ("cancel", None) => return false,
        ("builds", _) => "/api/builds".to_owned(),
        _ => format!("/api/environments/hello/{verb}"),
    };
    let begun = Instant::now();
    while landfall.lives() && begun.elapsed() < Duration::from_secs(3) {
        let body = match verb {
            "builds" => json!({"environment": "hello", "branch": BRANCH}),
            _ => json!({"reason": "the trial wishes it"}),
        };
        if let Some((status, _)) = landfall.try_write(&path, &body).await {
            assert_ne!(status, 400, "{verb}");
            if status < 300 {
                *history.asked.entry(verb.to_owned()).or_default() += 1;
            }
            history.may_be_held = match verb {
                "unpin" => false,
                "undo" | "pin" => true,
                _ => history.may_be_held,
            };
            break;
        }
        // Nobody answered: it may have been done.
        history.may_be_held |= matches!(verb, "undo" | "pin");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    false
}

/// As GitHub does it once; but an agent that is just starting is waited for.
async fn deliver(
    landfall: &mut Landfall,
    history: &mut History,
    commit: &str,
    payload: &Value,
) -> Option<i64> {
    let begun = Instant::now();
    while landfall.lives() && begun.elapsed() < Duration::from_secs(3) {
        if let Some((202, answer)) = landfall.try_deliver(payload).await {
            let build = answer["builds"][0]["build"].as_i64().unwrap();
            history.accepted.push((commit.to_owned(), build));
            return Some(build);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    None
}

async fn history_of(landfall: &Landfall) -> Vec<Value> {
    let releases = landfall
        .get("/api/environments/hello/releases?limit=200")
        .await;
    releases["releases"].as_array().unwrap().clone()
}

/// Each state that the Deployment was in, by a watch of kubectl.
fn watch(namespace: &str) -> Arc<Mutex<Vec<Seen>>> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (sink, namespace) = (Arc::clone(&seen), namespace.to_owned());
    tokio::spawn(async move {
        let path = r#"{.metadata.annotations.landfall\.dev/commit} {.metadata.labels.landfall\.dev/fence}{"\n"}"#;
        loop {
            let output = format!("jsonpath={path}");
            let arguments = [
                "-n",
                &namespace,
                "get",
                "deployment",
                "--watch",
                "-o",
                &output,
            ];
            let mut kubectl = tokio::process::Command::from(kubectl_command(&arguments))
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .kill_on_drop(true)
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(kubectl.stdout.take().unwrap()).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if let Some((commit, fence)) = line.split_once(' ') {
                    let (commit, fence) = (commit.to_owned(), fence.parse().unwrap_or(0));
                    sink.lock().unwrap().push(Seen { commit, fence });
                }
            }
            // A watch ends now and then, and begins with nothing to watch.
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    seen
}

/// What is left on this machine of builds, all of which have ended.
fn orphans(landfall: &Landfall, history: &History) -> Vec<String> {
    let name = std::fs::read_to_string(landfall.path("data/agent-id")).unwrap();
    let work = landfall.path("data/work").join(&name[..8]);
    let mut orphans: Vec<String> = std::fs::read_dir(&work)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path().display().to_string())
        .collect();
    let docker = |arguments: &[&str]| {
        let output = Command::new("docker").args(arguments).output().unwrap();
        assert!(output.status.success(), "docker {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let known = docker(&[
        "ps",
        "-a",
        "--format",
        "{{.ID}} {{.Label \"landfall.dev/owner\"}}",
    ]) + &docker(&["images", "--format", "{{.Repository}}:{{.Tag}}"]);
    for build in &history.builds {
        let folder = work.join(build["id"].to_string());
        let owner = landfall::stages::test::owner(&folder);
        orphans.extend(
            known
                .lines()
                .filter(|line| line.contains(&owner))
                .map(str::to_owned),
        );
    }
    orphans
}

impl History {
    fn commit_of(&self, build: i64) -> Option<&str> {
        let build = self.builds.iter().find(|one| one["id"] == build)?;
        build["commit"].as_str()
    }

    /// Its place on the branch.
    fn place(&self, commit: &str) -> usize {
        self.commits
            .iter()
            .position(|(one, _)| one == commit)
            .unwrap_or_else(|| panic!("nobody pushed {commit:?}"))
    }

    fn is_good(&self, commit: &str) -> bool {
        self.commits[self.place(commit)].1
    }

    /// From such a commit there is a way back: its program does not run, or its build lost agent after agent, and what stands is
    /// then settled by the release before.
    fn is_given_up(&self, commit: &str) -> bool {
        let errored = |build: &Value| build["commit"] == commit && build["status"] == "errored";
        !self.is_good(commit) || self.builds.iter().any(errored)
    }

    /// How often a build that a person asked for may have brought it again: by an undo, a redo, or (`forward` too) an unpin,
    /// which builds the head of the branch.
    fn asked_for(&self, commit: &str, forward: bool) -> usize {
        let is_asked = |build: &&Value| {
            let kind = build["kind"].as_str().unwrap();
            let begun = build["attempt"].as_i64() > Some(0);
            build["commit"] == commit
                && begun
                && (matches!(kind, "undo" | "redo") || forward && kind == "manual")
        };
        self.builds.iter().filter(is_asked).count()
    }

    /// Commits as the cluster saw them, each once for each time that it came.
    fn turns(&self) -> Vec<&str> {
        let mut turns: Vec<&str> = self
            .seen
            .iter()
            .map(|seen| seen.commit.as_str())
            .filter(|commit| !commit.is_empty())
            .collect();
        turns.dedup();
        turns
    }

    fn none(&self, violations: &[String]) {
        let mut all = String::new();
        for violation in violations {
            let _ = writeln!(all, "  {violation}");
        }
        // What is needed to understand it.
        let short = |commit: &Value| {
            let commit = commit.as_str().unwrap_or_default();
            commit.get(..7).unwrap_or("-").to_owned()
        };
        for (commit, is_good) in &self.commits {
            let _ = writeln!(all, "pushed {} good: {is_good}", &commit[..7]);
        }
        for turn in self.turns() {
            let _ = writeln!(all, "seen {}", &turn[..7]);
        }
        for build in self.builds.iter().rev() {
            let (commit, cause) = (short(&build["commit"]), &build["cause"]["sentence"]);
            let [id, kind, status, outcome] =
                ["id", "kind", "status", "outcome"].map(|key| &build[key]);
            let attempt = &build["attempt"];
            let _ = writeln!(
                all,
                "#{id} {commit} {kind} {status} {outcome} attempt {attempt} {cause}"
            );
        }
        assert!(
            violations.is_empty(),
            "{} violations (TRIAL_SEED={}):\n{all}",
            violations.len(),
            self.seed
        );
    }

    fn p1_a_202_is_on_disk(&self) {
        let lost = self
            .accepted
            .iter()
            .filter(|(commit, build)| self.commit_of(*build) != Some(commit));
        self.none(
            &lost
                .map(|(commit, build)| {
                    format!("#{build} of {commit} was answered and is not there")
                })
                .collect::<Vec<_>>(),
        );
        assert!(
            self.accepted.len() > 5,
            "hardly a delivery was answered: {:?}",
            self.accepted
        );
    }

    fn p2_nothing_is_lost(&self) {
        let mut lost = Vec::new();
        for build in self.builds.iter().filter(|build| !is_terminal(build)) {
            lost.push(format!("has not ended: {build}"));
        }
        for build in self
            .builds
            .iter()
            .filter(|build| build["status"] == "skipped" || build["status"] == "superseded")
        {
            if build["cause"].is_null() && build["superseded_by"].is_null() {
                lost.push(format!("no reason is told: {build}"));
            }
        }
        let (head, _) = self.commits.last().unwrap();
        if self
            .served
            .first()
            .is_none_or(|served| served["commit"] != head.as_str())
        {
            lost.push(format!(
                "the head {head} does not serve: {:?}",
                self.served.first()
            ));
        }
        self.none(&lost);
    }

    fn p3_each_effect_happens_once(&self) {
        let mut twice = Vec::new();
        for (commit, _) in &self.commits {
            let served = self
                .served
                .iter()
                .filter(|one| one["commit"] == commit.as_str() && one["state"] == "live")
                .count();
            let asked_for = self.asked_for(commit, true);
            if served > 1 + asked_for {
                twice.push(format!("{commit} went live {served} times"));
            }
            let turns = self.turns();
            let came = turns.iter().filter(|turn| *turn == commit).count();
            let back = turns
                .windows(2)
                .filter(|pair| pair[1] == commit && self.is_given_up(pair[0]))
                .count();
            if came > back + 1 + asked_for {
                twice.push(format!("{commit} was deployed {} times", came - back));
            }
        }
        self.none(&twice);
    }

    fn p4_never_backwards(&self) {
        let turns = self.turns();
        assert!(turns.len() > 3, "hardly anything was deployed: {turns:?}");
        let mut back: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for pair in turns.windows(2) {
            if self.place(pair[1]) < self.place(pair[0]) && !self.is_given_up(pair[0]) {
                back.entry(pair[1]).or_default().push(pair[0]);
            }
        }
        let unasked = back
            .iter()
            .filter(|(to, from)| from.len() > self.asked_for(to, false));
        self.none(
            &unasked
                .map(|(to, from)| format!("{to} came after each of {from:?}"))
                .collect::<Vec<_>>(),
        );
    }

    fn p5_one_mutator(&self) {
        let fences: Vec<i64> = self
            .seen
            .iter()
            .map(|seen| seen.fence)
            .filter(|fence| *fence > 0)
            .collect();
        let back = fences.windows(2).filter(|pair| pair[1] < pair[0]);
        self.none(
            &back
                .map(|pair| format!("fence {} wrote after {}", pair[0], pair[1]))
                .collect::<Vec<_>>(),
        );
        assert!(fences.len() > 3, "{fences:?}");
    }

    fn p6_a_build_goes_on_after_a_crash(&self) {
        let resumed = self
            .builds
            .iter()
            .filter(|build| build["attempt"].as_i64() > Some(1));
        let passed = resumed.filter(|build| build["status"] == "passed").count();
        assert!(passed > 0, "no build went on after a kill");
        let clock = self.kills.get("the clock").copied().unwrap_or_default();
        let all: usize = self.kills.values().sum();
        // A slow machine passes fewer of them in a round; with none this would be no trial.
        assert!(
            clock * 4 < all * 3,
            "hardly a fail point was passed: {:?}",
            self.kills
        );
    }

    fn p7_github_is_told_the_truth(&self) {
        let mut lies = Vec::new();
        for (commit, states) in &self.shown {
            let terminal = states.iter().position(|state| state != "pending");
            if terminal.is_some_and(|at| states[at..].iter().any(|state| state == "pending")) {
                lies.push(format!("{commit} went back to pending: {states:?}"));
            }
            let truth = |build: &Value| match build["status"].as_str().unwrap() {
                "passed" => Some("success"),
                "failed" | "canceled" => Some("failure"),
                "errored" => Some("error"),
                _ => None,
            };
            let of_commit = self
                .builds
                .iter()
                .filter(|one| one["commit"] == commit.as_str());
            let judged: Vec<&Value> = of_commit.filter(|one| truth(one).is_some()).collect();
            // The last word is of the one that ended last or, where they were told late, of the newest.
            let by_end = judged.iter().max_by_key(|one| one["finished_at"].as_i64());
            let last_words = by_end.into_iter().chain(judged.first());
            let last_words: Vec<_> = last_words.filter_map(|one| truth(one)).collect();
            let shown = states.last().map_or("", String::as_str);
            if !judged.is_empty() && !last_words.contains(&shown) {
                lies.push(format!("{commit}: {judged:?}, and GitHub shows {states:?}"));
            }
        }
        self.none(&lies);
    }

    fn p8_no_orphans(&self) {
        self.none(&self.orphans);
    }

    fn p9_memory_has_a_bound(&self) {
        assert!(
            self.anonymous_bytes > 0 && self.anonymous_bytes < ANONYMOUS_MAX,
            "{} bytes",
            self.anonymous_bytes
        );
    }

    fn p10_no_verdict_but_what_was_seen(&self) {
        let mut wrong = Vec::new();
        for build in &self.builds {
            let (status, outcome) = (
                build["status"].as_str().unwrap(),
                build["outcome"].as_str().unwrap(),
            );
            // One that a person asked for by branch, and that ended before it was looked up, has no commit.
            let is_good = match build["commit"].as_str().unwrap() {
                "" => false,
                commit => self.is_good(commit),
            };
            // One that lost its agent three times in a stage is given up, and says so.
            let is_given_up = status == "errored"
                && build["cause"]["sentence"]
                    .as_str()
                    .is_some_and(|told| told.contains("the agent died "));
            let is_right = match status {
                "passed" => is_good,
                "failed" => !is_good && outcome == "rolled_back",
                "errored" => is_given_up,
                _ => outcome == "unchanged",
            };
            if !is_right {
                wrong.push(format!("good: {is_good}, {build}"));
            }
        }
        self.none(&wrong);
        let errored = self.builds.iter().filter(|one| one["status"] == "errored");
        let (errored, all) = (errored.count(), self.builds.len());
        assert!(errored * 5 <= all, "{errored} of {all} were given up");
    }
}

/// The record of one trial, which the first test that asks for it runs.
fn recorded(
    record: &'static OnceLock<Result<History, String>>,
    name: &'static str,
    on_postgres: bool,
) -> &'static History {
    let run = move || async move {
        let postgres = if on_postgres {
            Some(Postgres::start().await)
        } else {
            None
        };
        run(name, postgres.as_ref().map(Postgres::url).as_deref()).await
    };
    let of_thread = move || tokio::runtime::Runtime::new().unwrap().block_on(run());
    let recorded = record.get_or_init(|| {
        std::thread::spawn(of_thread).join().map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_default()
        })
    });
    match recorded {
        Ok(history) => history,
        Err(why) => panic!("the trial did not come to its end: {why}"),
    }
}

macro_rules! promises {
    ($store:ident, $on_postgres:literal: $($promise:ident)*) => {
        mod $store {
            use super::*;

            static RECORD: OnceLock<Result<History, String>> = OnceLock::new();

            $(#[test]
            fn $promise() {
                recorded(&RECORD, concat!("trial-", stringify!($store)), $on_postgres).$promise();
            })*
        }
    };
    ($($promise:ident)*) => {
        promises!(sqlite, false: $($promise)*);
        promises!(postgres, true: $($promise)*);
    };
}

promises! {
    p1_a_202_is_on_disk
    p2_nothing_is_lost
    p3_each_effect_happens_once
    p4_never_backwards
    p5_one_mutator
    p6_a_build_goes_on_after_a_crash
    p7_github_is_told_the_truth
    p8_no_orphans
    p9_memory_has_a_bound
    p10_no_verdict_but_what_was_seen
}
