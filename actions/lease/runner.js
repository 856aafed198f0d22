// Shared by main.js and post.js: the runner's protocol (docs.github.com, "Workflow commands for GitHub Actions"), and
// running bkpool. It has no dependencies, so that the reviewed code is all that runs.
'use strict'

const { spawn } = require('node:child_process')
const crypto = require('node:crypto')
const fs = require('node:fs')
const path = require('node:path')

const input = (name) => (process.env[`INPUT_${name.toUpperCase()}`] || '').trim()

// Appends to one of the runner's files. The delimiter is random, so that no value can contain it.
function tell(variable, name, value) {
  const end = `end-${crypto.randomUUID()}`
  fs.appendFileSync(process.env[variable], `${name}<<${end}\n${value}\n${end}\n`)
}

const escaped = (text) => text.replace(/%/g, '%25').replace(/\r/g, '%0D').replace(/\n/g, '%0A')
const say = (command, text) => process.stdout.write(`::${command}::${escaped(text)}\n`)

// The environment in which bkpool finds the appliance. It finds the job's ID token by itself.
function environment(directory) {
  const env = { ...process.env, BKCTL_ENDPOINT: input('endpoint'), BKCTL_AUDIENCE: input('audience') }
  const ca = input('ca-cert')
  if (ca.includes('-----BEGIN')) {
    env.BKCTL_TLS_CA_CERT = path.join(directory, 'api-ca.crt')
    fs.writeFileSync(env.BKCTL_TLS_CA_CERT, `${ca}\n`, { mode: 0o600 })
  } else if (ca) {
    env.BKCTL_TLS_CA_CERT = ca
  }
  return env
}

// Runs a program, and passes on the signals that cancel a job. Its stderr goes to the job's log.
function run(program, args, env) {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, { env, stdio: ['ignore', 'pipe', 'inherit'] })
    for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => child.kill(signal))
    let out = ''
    child.stdout.on('data', (chunk) => { out += chunk })
    child.on('error', (error) => reject(new Error(`${program} cannot be run: ${error.code}`)))
    child.on('close', (code, signal) => resolve({ code: code ?? 1, signal, out }))
  })
}

module.exports = { environment, input, run, say, tell }
