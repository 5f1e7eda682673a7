for (const range of document.querySelectorAll('input[type="range"]')) {
  const show = () => range.parentElement.style.setProperty("--at", range.value + "%");
  range.addEventListener("input", show);
  show();
}

const root = document.documentElement;
const button = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
}

function label() {
  const other = isDark() ? "light" : "dark";
  button.textContent = other;
  button.setAttribute("aria-label", "Switch to " + other);
}

button.hidden = false;
button.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  label();
});
system.addEventListener("change", label);
label();
