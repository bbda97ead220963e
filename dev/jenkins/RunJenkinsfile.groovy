// Runs one build of a declarative Jenkinsfile, without Jenkins: checkout by git, `sh` by `sh -xe`, as Jenkins has it.
// The Groovy is that of Jenkins. What `when`, `post` and the rest mean is written here, from the manual: no proof
// that a real Jenkins agrees. What the Jenkinsfile of this repository does not use is not known, and an error.
//
// Arguments: REPOSITORY BRANCH WORKSPACE, or `--check JENKINSFILE` for the syntax of it and of its shell.
// Credentials come from CREDENTIAL_FILE_<id> and CREDENTIAL_LOGIN_<id> (user:password). Ends with 0 or, failed, 1.
import java.util.concurrent.TimeUnit

class StepFailed extends RuntimeException { StepFailed(String why) { super(why) } }

class Build {
    File workspace
    String repository, branch
    boolean check
    Map<String, String> env = [:]
    long deadline

    int run(String script) {
        if (check) return ['sh', 'bash'].every { syntax(it, script) } ? 0 : 2
        def process = start(['sh', '-xe', '-c', script])
        if (!process.waitFor(deadline - System.currentTimeMillis(), TimeUnit.MILLISECONDS)) {
            process.descendants().forEach { it.destroyForcibly() }
            process.destroyForcibly()
            throw new StepFailed('time-out')
        }
        process.exitValue()
    }

    boolean syntax(String shell, String script) { start([shell, '-n', '-c', script]).waitFor() == 0 }

    Process start(List<String> command) {
        def builder = new ProcessBuilder(command).directory(workspace).inheritIO()
        builder.environment().keySet().removeAll { it.startsWith('CREDENTIAL_') || it == 'KUBECONFIG' }
        env.each { key, value -> builder.environment().put(key, value as String) }
        builder.start()
    }

    /** Into the work space of the last build, as Jenkins does: what git does not know stays. */
    Map checkout() {
        if (check) return [GIT_COMMIT: '0' * 40, GIT_BRANCH: "origin/$branch" as String]
        def git = '''
            [ -d .git ] || git init -q .
            git fetch -q --force "$1" "+refs/heads/$2:refs/remotes/origin/$2"
            git checkout -q --force --detach "refs/remotes/origin/$2"
        '''
        if (start(['sh', '-ec', git, 'git', repository, branch]).waitFor()) throw new StepFailed('checkout failed')
        def head = ['git', 'rev-parse', 'HEAD'].execute(null as List, workspace).text.trim()
        [GIT_COMMIT: head, GIT_BRANCH: "origin/$branch" as String]
    }
}

/** A block whose words are its methods: any other word is an error. */
abstract class Block {
    Build build
    def fill(Closure body) {
        body.delegate = this
        body.resolveStrategy = Closure.DELEGATE_ONLY
        body.call()
        this
    }
}

class Environment extends Block {
    private final Build of
    Environment(Build of) { this.@of = of }
    void setProperty(String name, Object value) {
        if (value instanceof Map) value.each { suffix, part -> this.@of.env[name + suffix] = part }
        else this.@of.env[name] = value as String
    }
    Object getProperty(String name) { name == 'env' ? this.@of.env : this.@of.env[name] }
    def credentials(String id) {
        if (this.@of.check) return 'checked'
        def file = System.getenv("CREDENTIAL_FILE_$id"), login = System.getenv("CREDENTIAL_LOGIN_$id")
        if (file) return file
        if (!login) throw new StepFailed("no credential has the id $id")
        def (user, password) = login.split(':', 2)
        ['': login, _USR: user, _PSW: password]
    }
}

class Options extends Block {
    long timeoutMillis
    void timeout(Map limit) { timeoutMillis = TimeUnit.valueOf(limit.unit).toMillis(limit.time as long) }
    void skipDefaultCheckout() { }
    void disableConcurrentBuilds() { }
    void timestamps() { }
    void buildDiscarder(Object rotator) { }
    Object logRotator(Map limits) { limits }
}

class Triggers extends Block { void githubPush() { } }

class When extends Block {
    boolean holds = true
    Map getEnv() { build.env }
    void expression(Closure test) {
        test.delegate = this
        test.resolveStrategy = Closure.DELEGATE_ONLY
        holds = holds && test.call()
    }
}

class Steps extends Block {
    Object scm = 'scm'
    Map getEnv() { build.env }
    void sh(String script) {
        def code = build.run(script)
        if (code) throw new StepFailed("script returned exit code $code")
    }
    void echo(String text) { println text }
    void script(Closure body) { fill(body) }
    void retry(int times, Closure body) {
        try { fill(body) }
        catch (StepFailed why) {
            if (times <= 1) throw why
            println "[retry] $why.message"
            retry(times - 1, body)
        }
    }
    Map checkout(Object scm) { build.checkout() }
}

class Post extends Block {
    Map<String, Closure> bodies = [:]
    void always(Closure body) { bodies.always = body }
    void success(Closure body) { bodies.success = body }
    void failure(Closure body) { bodies.failure = body }
    void unsuccessful(Closure body) { bodies.unsuccessful = body }
    /** False where a step of it failed. */
    boolean run(boolean passed) {
        (['always'] + (passed ? ['success'] : ['failure', 'unsuccessful'])).findAll { bodies[it] }.every {
            try { new Steps(build: build).fill(bodies[it]); true }
            catch (StepFailed why) { println "[post $it] $why.message"; false }
        }
    }
}

class Stage extends Block {
    String title
    Closure conditions, settings, body
    Options limits
    Post after
    void when(Closure c) { conditions = c }
    void environment(Closure c) { settings = c }
    void options(Closure c) { limits = new Options(build: build).fill(c) }
    void steps(Closure c) { body = c }
    void post(Closure c) { after = new Post(build: build).fill(c) }

    boolean run(long buildDeadline) {
        println "[stage] $title"
        build.deadline = buildDeadline
        if (limits?.timeoutMillis) build.deadline = Math.min(buildDeadline, System.currentTimeMillis() + limits.timeoutMillis)
        def outside = build.env
        build.env = outside + [STAGE_NAME: title]
        if (settings) new Environment(build).fill(settings)
        def before = new HashMap(build.env), passed = true
        try { new Steps(build: build).fill(body) }
        catch (StepFailed why) { println "[stage] $title: $why.message"; passed = false }
        if (after) passed = after.run(passed) && passed
        // What `env.X = …` set in a script stays; what the stage's own environment block set goes.
        outside.putAll(build.env.findAll { key, value -> before[key] != value })
        build.env = outside
        println "[stage] $title: ${passed ? 'passed' : 'FAILED'}"
        passed
    }
}

class Stages extends Block {
    List<Stage> all = []
    void stage(String title, Closure body) { all << new Stage(build: build, title: title).fill(body) }
}

class Pipeline extends Block {
    Object any = 'any'
    Options limits
    List<Stage> all
    Post after
    void agent(Object where) { }
    void options(Closure c) { limits = new Options(build: build).fill(c) }
    void triggers(Closure c) { new Triggers(build: build).fill(c) }
    void environment(Closure c) { new Environment(build).fill(c) }
    void stages(Closure c) { all = new Stages(build: build).fill(c).all }
    void post(Closure c) { after = new Post(build: build).fill(c) }

    boolean run() {
        def deadline = System.currentTimeMillis() + limits.timeoutMillis, passed = true
        all.each {
            if (!passed) { println "[stage] $it.title: skipped, an earlier one failed"; return }
            if (it.conditions && !new When(build: build).fill(it.conditions).holds) { println "[stage] $it.title: skipped by when"; return }
            passed = it.run(deadline)
        }
        build.deadline = System.currentTimeMillis() + TimeUnit.MINUTES.toMillis(10)
        if (after) {
            passed = after.run(passed) && passed
            if (build.check) after.run(false)
        }
        passed
    }
}

abstract class Declarative extends Script {
    void pipeline(Closure body) {
        def pipeline = new Pipeline(build: binding.getVariable('build')).fill(body)
        binding.setVariable('passed', pipeline.run())
    }
}

boolean check = args[0] == '--check'
def build = new Build(check: check)
def file
if (check) {
    file = new File(args[1]).absoluteFile
    build.with { workspace = file.parentFile; branch = 'feature/jenkins-k8s-pipeline' }
} else {
    build.with { repository = args[0]; branch = args[1]; workspace = new File(args[2]).absoluteFile }
    build.workspace.mkdirs()
    // Jenkins reads the Jenkinsfile of the branch that it builds, and only then gives a work space to check it out into.
    def show = ['git', '--git-dir', build.repository, 'show', "$build.branch:Jenkinsfile" as String].execute()
    file = File.createTempFile('Jenkinsfile', '')
    file.deleteOnExit()
    file.bytes = show.inputStream.bytes
}
build.env.putAll(System.getenv().subMap(System.getenv().keySet().findAll { it in ['REGISTRY', 'BUILD_ARGS'] } as List))
if (System.getenv('MULTIBRANCH')) build.env.BRANCH_NAME = build.branch
def configuration = new org.codehaus.groovy.control.CompilerConfiguration(scriptBaseClass: "Declarative")
new GroovyShell(this.class.classLoader, new Binding(build: build, passed: null), configuration).with {
    evaluate(file)
    boolean passed = context.getVariable('passed')
    println "[build] ${passed ? 'SUCCESS' : 'FAILURE'}"
    System.out.flush()
    System.exit(passed ? 0 : 1)
}
