"use strict"
const $ = id => document.getElementById(id)
const limit = Number(document.body.dataset.limit), grid = 7
let models = [], queue = Promise.resolve(), formed = ""

async function ask(path, options = {}) {
  const headers = {...options.headers}
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`
  let answer
  try { answer = await fetch(path, {...options, headers}) }
  catch { throw new Error("the server cannot be reached; is it still running?") }
  const said = await answer.json().catch(() => ({}))
  if (answer.ok) return said
  if (answer.status == 401 || answer.status == 403) $("locked").hidden = false
  throw new Error(`${said.title ?? answer.status}: ${said.detail ?? "no reason given"}`
    + (said.request_id ? ` (request ${said.request_id})` : ""))
}

function tell(place, text) { place.textContent = text; place.hidden = !text }
const current = () => models.find(m => m.name == $("model").value) ?? models[0]
const kind = () => current()?.input.kind ?? "image"
const turned = () => current()?.input.exif == "apply"
const number = x => Number(x.toPrecision(6)).toLocaleString("en", {maximumFractionDigits: 20, useGrouping: false})
const percent = p => `${(100 * p).toFixed(1)} %`

function describe() {
  const m = current()
  if (!m) return
  const metrics = Object.entries(m.metrics).map(([k, v]) => `${k} ${Number(v.toPrecision(4))}`)
  const engine = m.engine ? `${m.precision} on ${m.engine.engine}` : "loaded when asked for"
  $("about").textContent = [`version ${m.version}`, m.arch, `${m.vocab.length} ${{numbers: "numbers", mask: "classes"}[m.output.kind] ?? "labels"}`, ...metrics, engine,
    `packed ${m.created.slice(0, 10)}`].join(" · ")
  $("drop").hidden = kind() != "image"
  $("form").hidden = kind() == "image"
  if (formed == `${m.name}@${m.version}`) return
  formed = `${m.name}@${m.version}`
  $("fields").replaceChildren(...kind() == "table" ? m.input.columns.map(c => field(c, m)) : kind() == "text" ? words(m) : [])
}

function make(tag, given = {}, ...inside) {
  const one = Object.assign(document.createElement(tag), given)
  one.append(...inside)
  return one
}

function field(column, m) {
  const seen = m.input.categories.find(c => c.column == column.name && !c.part)?.vocab ?? []
  const choices = column.type == "boolean" ? ["true", "false"] : column.type == "text" ? seen : []
  const needed = m.request.required?.includes(column.name) ?? false
  const example = column.example === null ? "" : String(column.example)
  let one
  if (choices.length && choices.length <= 50) {
    one = make("select", {}, ...["", ...choices].map(v => new Option(v, v, v == example, v == example)))
  } else {
    one = make("input", {type: {number: "number", date: example.includes("T") ? "datetime-local" : "date"}[column.type] ?? "text"})
    if (one.type != "text") one.step = "any"
    one.value = example
  }
  Object.assign(one, {name: column.name, required: needed})
  one.dataset.type = column.type
  return labelled(column.name, one)
}

function labelled(name, one) {
  one.id = `field ${name}`
  return make("div", {}, make("label", {htmlFor: one.id, textContent: name}), one)
}

const words = m => m.input.columns?.length > 1
  ? m.input.columns.map(name => labelled(name, make("textarea", {name, rows: 3})))
  : [labelled("Text", make("textarea", {name: "text", rows: 6, required: true}))]

function filled() {
  const values = {number: Number, boolean: v => v == "true"}, row = {}
  for (const one of $("fields").querySelectorAll("[name]"))
    if (one.value !== "") row[one.name] = (values[one.dataset.type] ?? String)(one.value)
  return row
}

async function look() {
  try {
    models = (await ask("/v1/models")).models
    tell($("trouble"), "")
  } catch (e) { return tell($("trouble"), e.message) }
  const names = models.map(m => m.name)
  if (names.join() != [...$("model").options].map(o => o.value).join()) {
    const chosen = $("model").value || models.find(m => m.default)?.name
    $("model").replaceChildren(...names.map(n => new Option(n, n, false, n == chosen)))
  }
  describe()
}

async function predict(name, inputs) {
  const path = `/v1/models/${encodeURIComponent(name)}/predict`
  if (!(inputs[0] instanceof Blob)) {
    const headers = {"Content-Type": "application/json"}
    return ask(path, {method: "POST", headers, body: JSON.stringify({instances: inputs})})
  }
  const form = new FormData()
  inputs.forEach((blob, i) => form.append("file", blob, blob.name ?? `${i}.jpg`))
  return ask(path, {method: "POST", body: form})
}

// The picture without what a browser turns it by: each turns some formats, even where it is told not to.
async function stored(file) {
  const bytes = new Uint8Array(await file.arrayBuffer()), view = new DataView(bytes.buffer), end = bytes.length - 8
  const word = i => String.fromCharCode(...bytes.subarray(i, i + 4)), hide = i => bytes.set([120, 88, 88, 120], i)
  if (word(0).startsWith("\xff\xd8"))
    for (let i = 2; i < end && bytes[i] == 0xff && bytes[i + 1] != 0xda; i += bytes[i + 1] == 0xff ? 1 : 2 + view.getUint16(i + 2)) {
      if (bytes[i + 1] == 0xe1) hide(i + 4)
    }
  else if (word(0) == "\x89PNG")
    for (let i = 8; i < end; i += 12 + view.getUint32(i)) { if (word(i + 4) == "eXIf") hide(i + 4) }
  else if (word(8) == "WEBP")
    for (let i = 12; i < end; i += 8 + 2 * Math.ceil(view.getUint32(i + 4, true) / 2)) { if (word(i) == "EXIF") hide(i) }
  else if (word(4) == "ftyp")  // AVIF: what turns or mirrors it turns it by nothing
    for (let i = 8; i < Math.min(end, 1 << 16); i++) if (["irot", "imir"].includes(word(i))) bytes.set([105, 114, 111, 116, 0], i)
  return new Blob([bytes])
}

const turns = [, [1, 0, 0, 1], [-1, 0, 0, 1], [-1, 0, 0, -1], [1, 0, 0, -1], [0, 1, 1, 0], [0, 1, -1, 0], [0, -1, -1, 0], [0, -1, 1, 0]]

async function draw(canvas, blob, name, orientation = 1) {
  const picture = await createImageBitmap(blob).catch(() => null)
  if (!picture) return  // a TIFF, for instance: the server reads it, the browser does not
  const scale = Math.min(1, 448 / Math.max(picture.width, picture.height))
  const [w, h] = [picture.width, picture.height].map(side => Math.max(1, Math.round(side * scale)))
  const [a, b, c, d] = turns[orientation], context = canvas.getContext("2d")
  ;[canvas.width, canvas.height] = orientation > 4 ? [h, w] : [w, h]
  context.setTransform(a, b, c, d, a + c < 0 ? canvas.width : 0, b + d < 0 ? canvas.height : 0)
  context.drawImage(picture, 0, 0, w, h)
  context.resetTransform()
  canvas.hidden = false
  canvas.setAttribute("role", "img")
  canvas.setAttribute("aria-label", name)
}

function curl(name, input) {
  const quoted = text => `'${text.replace(/'/g, "'\\''")}'`
  const key = $("key").value ? ' -H "Authorization: Bearer $MLKIT_KEY"' : ""
  const sent = input instanceof Blob
    ? `-F ${quoted(`file=@"${input.name.replace(/(["\\])/g, "\\$1")}"`)}`
    : `-H 'Content-Type: application/json' -d ${quoted(JSON.stringify({instances: [input]}))}`
  return `curl${key} ${sent} ${location.origin}/v1/models/${name}/predict`
}

function list(place, title, rows) {
  place.setAttribute("aria-label", title)
  place.replaceChildren(...rows.map(([name, value, style = {}, over = false]) => {
    const row = make("li", {className: over ? "over" : ""}, ...[name, value].map(t => make("span", {textContent: t})))
    for (const [key, v] of Object.entries(style)) row.style.setProperty(key, v)
    return row
  }))
}

const bar = p => ({"--p": `${100 * p}%`})
const likeliest = shares => Object.entries(shares).sort((a, b) => b[1] - a[1])

const shown = {
  label(card, one) {
    list(card.querySelector("ol"), "probabilities", likeliest(one.probabilities).map(([l, p]) => [l, percent(p), bar(p)]))
    return `${one.label}, ${percent(one.confidence)}`
  },
  labels(card, one, m) {
    const least = Object.fromEntries(m.vocab.map((label, i) => [label, m.output.thresholds[i]]))
    list(card.querySelector("ol"), "probabilities", likeliest(one.probabilities).map(([l, p]) =>
      [l, `${percent(p)}, given from ${percent(least[l])}`, bar(p), one.labels.includes(l)]))
    return one.labels.join(", ") || "none of the labels"
  },
  numbers(card, one) {
    const rows = Object.entries(one.values).map(([n, v]) => [n, `${number(v)} ${one.units[n] ?? ""}`.trim()])
    card.querySelector("ol").className = "numbers"
    list(card.querySelector("ol"), "numbers", rows)
    return rows.map(row => row.join(" ")).join(", ")
  },
  mask(card, one, m) {
    const color = Object.fromEntries(m.vocab.map((label, i) => [label, `rgb(${m.output.palette[i].join(" ")})`]))
    const rows = likeliest(one.areas).map(([l, p]) => [l, percent(p), {...bar(p), "--c": color[l]}])
    card.querySelector("ol").className = "areas"
    list(card.querySelector("ol"), "share of each class", rows)
    cover(card.querySelector("canvas"), one)
    return rows.slice(0, 2).map(row => row.slice(0, 2).join(" ")).join(", ")
  },
}

async function cover(canvas, one) {
  const png = Uint8Array.from(atob(one.mask), c => c.charCodeAt(0))
  const mask = await createImageBitmap(new Blob([png], {type: "image/png"}))
  if (canvas.hidden) Object.assign(canvas, {width: one.width, height: one.height, hidden: false})
  const context = canvas.getContext("2d")
  context.imageSmoothingEnabled = false
  context.globalAlpha = 0.5
  context.drawImage(mask, 0, 0, canvas.width, canvas.height)
}

async function show(input, name) {
  const card = $("card").content.firstElementChild.cloneNode(true)
  card.querySelector("h2").textContent = name
  $("answers").prepend(card)
  if (input instanceof Blob) await draw(card.querySelector("canvas"), turned() ? input : await stored(input), name)
  await answer(card, input, name)
}

async function answer(card, input, about) {
  if (!current()) await look()  // dropped before the page had heard of a model
  const part = s => card.querySelector(s), m = current(), name = m?.name
  if (!name) return tell(part(".wrong"), $("trouble").textContent || "no model is served here yet")
  if ((input instanceof Blob) != (kind() == "image")) return tell(part(".wrong"), `${name} takes no picture`)
  let said
  try { said = await predict(name, [input]) } catch (e) { return tell(part(".wrong"), e.message) }
  const one = said.predictions[0], tag = input instanceof Blob && (one.notes?.applied ?? one.notes?.ignored)?.[0]
  if (turned()) await draw(part("canvas"), await stored(input), about, one.notes?.applied ? Number(tag.slice(-1)) : 1)
  part("h2").textContent = shown[m.output.kind](card, one, m)
  part("canvas").setAttribute("aria-label", `${about}: ${part("h2").textContent}`)
  part(".ask span").textContent = `${about}, answered by ${said.model}@${said.version}`
  part(".ask").hidden = part(".curl").hidden = false
  part(".cut").hidden = !one.truncated
  if (tag) tell(part(".tag"), one.notes.applied
    ? `The model saw it turned, as its ${tag} says.` : `The model saw it as it is stored; its ${tag} is ignored.`)
  part("code").textContent = curl(name, input)
  part(".copy").hidden = !navigator.clipboard  // browsers lend it to https and to localhost
  part(".copy").onclick = () => navigator.clipboard.writeText(part("code").textContent)
    .then(() => { part(".copy").textContent = "Copied" })
  part(".where").hidden = part("canvas").hidden || m.output.kind != "label"
  part(".where").onclick = () => where(card, name, one.label)
  if (said.version != models.find(m => m.name == name)?.version) await look()
}

async function where(card, name, label) {
  const part = s => card.querySelector(s), canvas = part("canvas"), button = part(".where")
  button.disabled = true
  try {
    const falls = await occlude(canvas, name, label, n => { button.textContent = `Asking: ${n} of ${grid * grid}` })
    const most = Math.max(...falls)
    if (most > 0.01) paint(canvas, falls.map(f => Math.max(0, f) / most))
    part(".ask span").textContent = most > 0.01
      ? `Red: covering it costs ${label} up to ${percent(most)}`
      : `No one place: covering any square costs ${label} less than 1 %`
    button.hidden = true
  } catch (e) { tell(part(".wrong"), e.message); button.disabled = false; button.textContent = "What mattered?" }
}

async function occlude(canvas, name, label, progress) {
  const {width, height} = canvas, copy = new OffscreenCanvas(width, height), context = copy.getContext("2d")
  const blob = () => copy.convertToBlob({type: "image/jpeg", quality: 0.92})
  context.drawImage(canvas, 0, 0, 1, 1)
  const [r, g, b] = context.getImageData(0, 0, 1, 1).data, side = 2 / grid
  context.drawImage(canvas, 0, 0)
  const odds = [], pictures = [await blob()]
  for (let i = 0; i < grid * grid; i++) {
    const x = (i % grid + 0.5) / grid - side / 2, y = (Math.floor(i / grid) + 0.5) / grid - side / 2
    context.drawImage(canvas, 0, 0)
    context.fillStyle = `rgb(${r} ${g} ${b})`
    context.fillRect(x * width, y * height, side * width, side * height)
    pictures.push(await blob())
  }
  while (odds.length < pictures.length) {
    progress(odds.length)
    const said = await predict(name, pictures.slice(odds.length, odds.length + Math.min(limit, 25)))
    odds.push(...said.predictions.map(p => p.probabilities[label]))
  }
  return odds.slice(1).map(p => odds[0] - p)
}

function paint(canvas, heat) {
  const small = new OffscreenCanvas(grid, grid), pixels = new ImageData(grid, grid)
  heat.forEach((h, i) => pixels.data.set([230, 30, 30, 190 * h], 4 * i))
  small.getContext("2d").putImageData(pixels, 0, 0)
  const context = canvas.getContext("2d")
  context.imageSmoothingQuality = "high"
  context.drawImage(small, 0, 0, canvas.width, canvas.height)
}

function later(input, name) { queue = queue.then(() => show(input, name)) }
function take(files) { for (const file of files) later(file, file.name) }

$("files").onchange = () => { take($("files").files); $("files").value = "" }
$("form").onsubmit = e => {
  e.preventDefault()
  const row = filled(), said = kind() == "text" ? Object.values(row).join(" ") : Object.entries(row).map(pair => pair.join(" ")).join(", ")
  later(row, said.length > 80 ? `${said.slice(0, 79)}…` : said)
}
$("model").onchange = describe
$("key").onchange = look
document.addEventListener("paste", e => take(e.clipboardData.files))
for (const kind of ["dragover", "dragleave", "drop"]) document.addEventListener(kind, e => {
  if (!e.dataTransfer?.types.includes("Files")) return
  e.preventDefault()
  $("drop").classList.toggle("over", kind == "dragover")
  if (kind == "drop") take(e.dataTransfer.files)
})
setInterval(() => document.hidden || look(), 10_000)
look()
